// SReLU on the CPU: which tensors the formulas of srelu.cuh read and write. The loops are in walk_cpu.h.
#include "srelu.h"

#include "srelu.cuh"
#include "walk_cpu.h"

namespace isonet_fast::cpu {

void srelu_forward(const SReLUForwardArgs& args) {
  walk<SReLUForward>({args.dtype, args.extent, {args.x}, {args.y}, args.bias, {}, nullptr, nullptr});
}

void srelu_backward(const SReLUBackwardArgs& args) {
  walk<SReLUBackward>({args.dtype, args.extent, {args.grad_output, args.output}, {args.grad_x}, args.bias, {},
                       args.grad_bias, nullptr});
}

}  // namespace isonet_fast::cpu
