// The contract of the orthogonality penalty for small layers on the CPU: raw pointers, sizes, strides; no torch.
//
//   loss    = 1/2 * sum over t in T of || R_t ||_F^2,   R_t = sum over u of A_u A_{u+t}^T - [t = 0] I
//   dL/dA_u = 2 * sum over v with v - u in T of R_{v-u} A_v                         A_u = tap u, rows x columns
//
// The offsets are some of the half of T that `geometry.py` lists: R_{-t} is the transpose of R_t, so an offset other
// than 0 stands for both. Groups add up.
#pragma once

#include <cstdint>
#include <vector>

namespace isonet_fast {

struct OrthogonalityLayer {
  // a tensor (O, I/groups, k...), of any strides
  int64_t dims;
  const int64_t* sizes;
  const float* weight;
  const int64_t* weight_strides;
  float* grad;  // null: the loss alone
  const int64_t* grad_strides;
  float scale;  // of the gradient
  int64_t groups;
  bool transposed;         // rows are inputs
  bool one_tap;            // all that follows O counts as inputs
  int64_t kernel[3];       // padded with ones in front
  int64_t count;
  const int64_t* offsets;  // (count, 3), padded with zeros in front
};

namespace cpu {
// The loss of every layer; the gradient times the scale is written, or added if `add`.
void orthogonality(const std::vector<OrthogonalityLayer>& layers, bool add, double* losses);
}  // namespace cpu

}  // namespace isonet_fast
