// SReLU's CUDA launchers: which tensors the formulas of srelu.cuh read and write. The kernels are in walk.cuh.
#include "srelu.h"

#include "launch.cuh"
#include "srelu.cuh"

namespace isonet_fast::cuda {
namespace {

Call backward_call(const SReLUBackwardArgs& args) {
  Call call{args.dtype, args.extent, {args.grad_output, args.output}, {args.grad_x}, args.bias};
  call.grad_bias = {args.grad_bias, args.bias.dtype};
  return call;
}

}  // namespace

cudaError_t srelu_forward(const SReLUForwardArgs& args, cudaStream_t stream) {
  const Call call{args.dtype, args.extent, {args.x}, {args.y}, args.bias};
  return launch<SReLUForward>(call, nullptr, stream);
}

int64_t srelu_backward_workspace(const SReLUBackwardArgs& args) {
  return workspace_bytes<SReLUBackward>(backward_call(args));
}

cudaError_t srelu_backward(const SReLUBackwardArgs& args, void* workspace, cudaStream_t stream) {
  return launch<SReLUBackward>(backward_call(args), workspace, stream);
}

}  // namespace isonet_fast::cuda
