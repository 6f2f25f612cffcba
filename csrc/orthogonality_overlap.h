// The overlap form: a product of taps for every offset between them.
//
// Taps that follow each other in the kernel's last dimension lie one below the other, so that a run of them is one
// matrix P:
//   R    += A_u A_v^T    = P_u^T P_v      over (taps of the run, columns)
//   G_u  += (R A_v)^T    = P_v R^T        G_v += (R^T A_u)^T = P_u R        for all taps of the run at once
// Every product has its right factor and its result in rows of one length: one kernel serves all.
#pragma once

#include "orthogonality_plan.h"

namespace isonet_fast::cpu {

// sums (kRows x 8) += a^T b in float64, for packed taps a, b of at most eight rows.
template <int kRows>
ISONET_FAST_INLINE void multiply_thin(int64_t rows, int64_t depth, const float* a, const float* b, double* sums) {
  if (rows == kRows) {
    double sum[kRows][kPadding] = {};
    for (int64_t k = 0; k < depth; ++k, a += kPadding, b += kPadding)
      for (int i = 0; i < kRows; ++i)
        for (int64_t j = 0; j < kPadding; ++j) sum[i][j] += double(a[i]) * double(b[j]);
    for (int i = 0; i < kRows; ++i)
      for (int64_t j = 0; j < kPadding; ++j) sums[i * kPadding + j] += sum[i][j];
  } else if constexpr (kRows > 1) {
    multiply_thin<kRows - 1>(rows, depth, a, b, sums);
  }
}

struct MultiplyThin {
  ISONET_FAST_INLINE void operator()(int64_t rows, int64_t depth, const float* a, const float* b, double* sums) const {
    multiply_thin<kPadding>(rows, depth, a, b, sums);
  }
};

// The sum of the squares; the transpose is written to `to`.
struct Square {
  ISONET_FAST_INLINE void operator()(int64_t stride, const float* r, float* to, double& total) const {
    for (int64_t i = 0; i < stride; i += 8)
      for (int64_t j = 0; j < stride; j += 8) {
        Vector8 rows[8];
        transpose(r + i * stride + j, stride, rows);
        for (int k = 0; k < 8; ++k) *reinterpret_cast<Vector8*>(to + (j + k) * stride + i) = rows[k];
      }
    total = sum_of_squares(r, stride * stride);
  }
};

// Calls `run(u, v, length)` for the runs of taps that overlap their neighbours at offset t: u, v = u + t the first.
template <class Run>
void for_runs(const int64_t (&kernel)[3], const int64_t* t, const Run& run) {
  const int64_t ahead = (t[0] * kernel[1] + t[1]) * kernel[2] + t[2];
  int64_t first[3], last[3];
  for (int d = 0; d < 3; ++d) {
    first[d] = std::max<int64_t>(0, -t[d]);
    last[d] = kernel[d] - std::max<int64_t>(0, t[d]);
  }
  for (int64_t i = first[0]; i < last[0]; ++i)
    for (int64_t j = first[1]; j < last[1]; ++j) {
      const int64_t u = (i * kernel[1] + j) * kernel[2] + first[2];
      run(u, u + ahead, last[2] - first[2]);
    }
}

// R_t = G_t - [t = 0] I of one group.
inline void compute_residual(const Plan& plan, const int64_t* t, bool zero, const float* packed, float* residual) {
  const int64_t rows = plan.rows, stride = plan.stride, tap = plan.size;
  const float one = zero ? 1 : 0;
  if (plan.thin()) {
    double sums[kPadding * kPadding] = {};
    for (int64_t m = 0; m < rows; ++m) sums[m * kPadding + m] = -one;
    for_runs(plan.layer.kernel, t, [&](int64_t u, int64_t v, int64_t length) {
      run(MultiplyThin{}, rows, length * plan.columns, packed + u * tap, packed + v * tap, sums);
    });
    std::copy(sums, sums + plan.square(), residual);
  } else {
    std::fill(residual, residual + plan.square(), 0.0f);
    for (int64_t m = 0; m < rows; ++m) residual[m * stride + m] = -one;
    for_runs(plan.layer.kernel, t, [&](int64_t u, int64_t v, int64_t length) {
      multiply<true>(rows, length * plan.columns, packed + u * tap, packed + v * tap, residual, stride);
    });
  }
}

inline int64_t overlap_scratch(const Plan& plan) { return 2 * plan.square(); }

// The loss of one group. Half of its gradient, if wanted, is added to `grad`.
inline double compute_overlap(const Plan& plan, const float* packed, float* grad, float* scratch) {
  const int64_t rows = plan.rows, columns = plan.columns, stride = plan.stride, tap = plan.size;
  float *const residual = scratch, *const transpose = scratch + plan.square();
  double loss = 0;
  for (const int64_t* t = plan.layer.units; t < plan.layer.units + 3 * plan.layer.count; t += 3) {
    const bool zero = is_zero(t);
    compute_residual(plan, t, zero, packed, residual);
    double square;
    run(Square{}, stride, residual, transpose, square);
    loss += zero ? square / 2 : square;
    if (grad == nullptr) continue;
    for_runs(plan.layer.kernel, t, [&](int64_t u, int64_t v, int64_t length) {
      multiply<false>(length * columns, rows, packed + v * tap, transpose, grad + u * tap, stride);
      if (!zero) multiply<false>(length * columns, rows, packed + u * tap, residual, grad + v * tap, stride);
    });
  }
  return loss;
}

}  // namespace isonet_fast::cpu
