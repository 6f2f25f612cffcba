// One call of an elementwise kernel: raw pointers, sizes, a dtype; no torch. Its formula (srelu.h) says what it
// computes.
//
// All tensors of a call share dtype, extent and memory order. The bias is rounded to that dtype before it is compared,
// the scale is not. Gradients of the two are accumulated in float32 (float64 for float64; a short sum on the CPU too) in a
// fixed order, and rounded once to their dtype. A forward may write over a tensor that it reads; the gradients may not
// overlap their inputs.
#pragma once

#include "tensor.h"

#ifdef ISONET_FAST_CUDA
#include <cuda_runtime_api.h>
#endif

namespace isonet_fast {

struct Call {
  DType dtype;
  Extent extent;
  const void* in[3] = {};  // what the formula reads, in its order
  void* out[2] = {};       // what it writes
  Parameter bias;
  Parameter scale = {};        // without data: 1
  void* grad_bias = nullptr;   // (channels,), of the bias's dtype
  void* grad_scale = nullptr;  // one element, of the scale's dtype
};

// Defined in elementwise_cpu.h and launch.cuh, instantiated for each formula in the sources of its op.
namespace cpu {
template <class Formula>
void launch(const Call& call);
}  // namespace cpu

#ifdef ISONET_FAST_CUDA
namespace cuda {
// Bytes of device memory, aligned to 16, that a formula with sums needs for its partial sums.
template <class Formula>
int64_t workspace_bytes(const Call& call);
template <class Formula>
cudaError_t launch(const Call& call, void* workspace, cudaStream_t stream);
}  // namespace cuda
#endif

}  // namespace isonet_fast
