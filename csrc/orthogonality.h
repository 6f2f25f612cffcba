// The contract of the orthogonality penalty for small layers on the CPU: raw pointers, sizes, strides; no torch.
//
//   loss    = 1/2 * sum over t in T of || R_t ||_F^2,   R_t = sum over u of A_u A_{u+t}^T - [t = 0] I
//   dL/dA_u = 2 * sum over v with v - u in T of R_{v-u} A_v                         A_u = tap u, rows x columns
//
// or, the same summed over frequencies (isonet_fast/ops/frequency_form.py):
//
//   loss    = 1/(2n) * sum over w of || R(w) ||_F^2,   R(w) = B(w) B(w)^H - I,   B(w) = sum over q of B_q e^{-iwq}
//   dL/dB_q = 2/n * sum over w of Re(e^{iwq} R(w) B(w))
//
// A unit is an offset or a frequency, some of the half that `geometry.py` lists: R_{-t} is the transpose of R_t, and
// R(-w) the conjugate of R(w), so a unit other than 0 stands for both. Groups add up.
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
  float* grad;  // null: only the loss
  const int64_t* grad_strides;
  float scale;  // of the gradient
  int64_t groups;
  bool transposed;         // rows are inputs
  bool one_tap;            // all that follows O counts as inputs
  int64_t kernel[3];       // padded with ones in front
  bool frequency;          // units are frequencies, not offsets
  int64_t phases[3];       // r, for frequencies; else 1
  int64_t count;
  const int64_t* units;    // (count, 3), padded with zeros in front
  const float* waves;      // (count, Q), for frequencies: of every q the cosine, or beyond the middle q the sine, of wq
};

namespace cpu {
// The loss of every layer; the gradient times the scale is written, or added if `add`.
void orthogonality(const std::vector<OrthogonalityLayer>& layers, bool add, double* losses);
}  // namespace cpu

}  // namespace isonet_fast
