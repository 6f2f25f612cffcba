// The residual join on the CPU: which tensors the formulas of residual_srelu.cuh read and write.
#include "residual_srelu.h"

#include "residual_srelu.cuh"
#include "walk_cpu.h"

namespace isonet_fast::cpu {

void residual_srelu_forward(const ResidualSReLUForwardArgs& args) {
  walk<ResidualSReLUForward>({args.dtype, args.extent, {args.shortcut, args.branch}, {args.y}, args.bias, args.scale,
                              nullptr, nullptr});
}

void residual_srelu_backward(const ResidualSReLUBackwardArgs& args) {
  walk<ResidualSReLUBackward>({args.dtype, args.extent, {args.grad_output, args.output, args.branch},
                               {args.grad_shortcut, args.grad_branch}, args.bias, args.scale, args.grad_bias,
                               args.grad_scale});
}

}  // namespace isonet_fast::cpu
