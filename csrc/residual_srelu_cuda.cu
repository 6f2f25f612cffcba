// The residual join's CUDA launchers: which tensors the formulas of residual_srelu.cuh read and write.
#include "residual_srelu.h"

#include "launch.cuh"
#include "residual_srelu.cuh"

namespace isonet_fast::cuda {
namespace {

Call backward_call(const ResidualSReLUBackwardArgs& args) {
  Call call{args.dtype,
            args.extent,
            {args.grad_output, args.output, args.branch},
            {args.grad_shortcut, args.grad_branch},
            args.bias,
            args.scale};
  call.grad_bias = {args.grad_bias, args.bias.dtype};
  call.grad_scale = {args.grad_scale, args.scale.dtype};
  return call;
}

}  // namespace

cudaError_t residual_srelu_forward(const ResidualSReLUForwardArgs& args, cudaStream_t stream) {
  const Call call{args.dtype, args.extent, {args.shortcut, args.branch}, {args.y}, args.bias, args.scale};
  return launch<ResidualSReLUForward>(call, nullptr, stream);
}

int64_t residual_srelu_backward_workspace(const ResidualSReLUBackwardArgs& args) {
  return workspace_bytes<ResidualSReLUBackward>(backward_call(args));
}

cudaError_t residual_srelu_backward(const ResidualSReLUBackwardArgs& args, void* workspace, cudaStream_t stream) {
  return launch<ResidualSReLUBackward>(backward_call(args), workspace, stream);
}

}  // namespace isonet_fast::cuda
