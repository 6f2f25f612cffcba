// The arithmetic of the residual join for one element; see srelu.h for what a formula is.
//
//   y = max(shortcut + s * branch, b)        the sum formed in float32 (float64 for float64), rounded once
//   dshortcut = g m,  dbranch = s g m,  ds = sum of g m branch,  db = sum of g (1 - m),  m = not (y <= b)
//
// A join without a scale runs the same forward with s = 1 (1 * branch is exact) and SReLU's own backward.
#pragma once

#include "srelu.h"

namespace isonet_fast {

struct ResidualSReLUForward {
  static constexpr int kReads = 2;   // shortcut, branch
  static constexpr int kWrites = 1;  // y
  static constexpr bool kSumsBias = false;
  static constexpr bool kSumsScale = false;

  template <typename A, typename S>
  ISONET_FAST_FORMULA void apply(const A (&in)[2], A b, A s, A (&out)[1], S& grad_bias, S& grad_scale) {
    const A sum[1] = {in[0] + s * in[1]};
    SReLUForward::apply(sum, b, s, out, grad_bias, grad_scale);
  }
};

struct ResidualSReLUBackward {
  static constexpr int kReads = 3;   // g, y, branch
  static constexpr int kWrites = 2;  // dshortcut, dbranch
  static constexpr bool kSumsBias = true;
  static constexpr bool kSumsScale = true;

  template <typename A, typename S>
  ISONET_FAST_FORMULA void apply(const A (&in)[3], A b, A s, A (&out)[2], S& grad_bias, S& grad_scale) {
    const bool blocked = in[1] <= b;
    const A g = blocked ? A(0) : in[0];
    out[0] = g;
    out[1] = s * g;
    grad_bias += S(blocked ? in[0] : A(0));
    grad_scale += S(g) * S(in[2]);
  }
};

}  // namespace isonet_fast
