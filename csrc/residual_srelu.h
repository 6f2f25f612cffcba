// The contract of the residual join's launchers: raw pointers, sizes, a dtype and a stream; no torch.
//
//   y = max(shortcut + s * branch, b)        the sum formed in float32 (float64 for float64), rounded once
//   dshortcut = g m,  dbranch = s g m,  ds = sum of g m branch,  db = sum of g (1 - m),  m = not (y <= b)
//
// Without a scale (scale.data null) s is 1, and the backward is SReLU's own. Dtypes, memory order and
// accumulation as in srelu.h. y may be the branch's memory; the gradients may not overlap their inputs.
#pragma once

#include "srelu.h"

namespace isonet_fast {

struct ResidualSReLUForwardArgs {
  DType dtype;
  Extent extent;
  const void* shortcut;
  const void* branch;
  Parameter bias;
  Parameter scale;
  void* y;
};

struct ResidualSReLUBackwardArgs {
  DType dtype;
  Extent extent;
  const void* grad_output;
  const void* output;
  const void* branch;
  Parameter bias;
  Parameter scale;
  void* grad_shortcut;
  void* grad_branch;
  void* grad_bias;   // (channels,), bias.dtype
  void* grad_scale;  // one element, scale.dtype
};

namespace cpu {
void residual_srelu_forward(const ResidualSReLUForwardArgs& args);
void residual_srelu_backward(const ResidualSReLUBackwardArgs& args);
}  // namespace cpu

#ifdef ISONET_FAST_CUDA
namespace cuda {
cudaError_t residual_srelu_forward(const ResidualSReLUForwardArgs& args, cudaStream_t stream);
int64_t residual_srelu_backward_workspace(const ResidualSReLUBackwardArgs& args);
cudaError_t residual_srelu_backward(const ResidualSReLUBackwardArgs& args, void* workspace, cudaStream_t stream);
}  // namespace cuda
#endif

}  // namespace isonet_fast
