// The contract of the SReLU launchers: raw pointers, sizes, a dtype and a stream; no torch.
//
//   y  = x if (x > b or x is NaN) else b
//   dx = g m,  db = sum of g (1 - m) over all but the channels,  m = not (y <= b)
//
// All tensors of one call share dtype, extent and memory order. b is rounded to that dtype before it is
// compared; db is accumulated in float32 (float64 for float64; a short sum on the CPU too) in a fixed order, and rounded
// once to b's dtype.
// x and y may be the same memory; the gradients may not overlap their inputs.
#pragma once

#include "tensor.h"

#ifdef ISONET_FAST_CUDA
#include <cuda_runtime_api.h>
#endif

namespace isonet_fast {

struct SReLUForwardArgs {
  DType dtype;
  Extent extent;
  const void* x;
  Parameter bias;
  void* y;
};

struct SReLUBackwardArgs {
  DType dtype;
  Extent extent;
  const void* grad_output;
  const void* output;
  Parameter bias;
  void* grad_x;
  void* grad_bias;  // (channels,), bias.dtype
};

namespace cpu {
void srelu_forward(const SReLUForwardArgs& args);
void srelu_backward(const SReLUBackwardArgs& args);
}  // namespace cpu

#ifdef ISONET_FAST_CUDA
namespace cuda {
cudaError_t srelu_forward(const SReLUForwardArgs& args, cudaStream_t stream);
// The backward needs this many bytes of device memory, aligned to 16, for its partial sums.
int64_t srelu_backward_workspace(const SReLUBackwardArgs& args);
cudaError_t srelu_backward(const SReLUBackwardArgs& args, void* workspace, cudaStream_t stream);
}  // namespace cuda
#endif

}  // namespace isonet_fast
