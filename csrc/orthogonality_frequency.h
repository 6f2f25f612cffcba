// The frequency form: two real products for the residual of a pair of frequencies w and -w, three for its gradient.
//
// q is counted from the middle of the kernel. This turns all B(w) by a phase, which R(w) does not see, and q and -q
// share a cosine and a sine:
//   B(w) = C - iS      C = sum of (B_q + B_{-q}) cos wq      S = sum of (B_q - B_{-q}) sin wq      over half of the q
// U = Re R + Im R determines R, because Re R is symmetric and Im R is antisymmetric. With X = C + S and Z = C - S
//   U = C X^T - S Z^T - I,    Re(R B) = U^T C + Im R X,    Im(R B) = Re R Z - U^T C
// (Gauss's trick, with the matrices that lie right: packed, M C is the product of C and the transpose of M.)
#pragma once

#include "orthogonality_plan.h"

namespace isonet_fast::cpu {

constexpr int64_t kSlice = 1 << 16;  // floats of C and S of the frequencies that are computed together, in cache

// Replaces every pair u, v of opposite blocks by their sum and their difference v - u.
struct Fold {
  ISONET_FAST_INLINE void operator()(int64_t blocks, int64_t length, int64_t size, float* b) const {
    for (int64_t u = 0, v = blocks - 1; u < v; ++u, --v)
      for (int64_t i = 0; i < length; ++i) {
        const float sum = b[u * size + i] + b[v * size + i];
        b[v * size + i] -= b[u * size + i];
        b[u * size + i] = sum;
      }
  }
};

// The transpose of Fold, times a factor.
struct Unfold {
  ISONET_FAST_INLINE void operator()(int64_t blocks, int64_t length, int64_t size, float factor, float* b) const {
    for (int64_t u = 0, v = blocks - 1; u <= v; ++u, --v)
      for (int64_t i = 0; i < length; ++i) {
        const float even = factor * b[u * size + i], odd = u < v ? factor * b[v * size + i] : 0;
        b[u * size + i] = even + odd;
        if (u < v) b[v * size + i] = even - odd;
      }
  }
};

// out (kBlock) += sum of factor * plane over planes that lie `size` apart
template <int kLanes>
ISONET_FAST_INLINE void combine(int64_t count, const float* factors, int64_t step, const float* planes, int64_t size,
                                float* out) {
  using Vector = typename VectorOf<kLanes>::Type;
  constexpr int kVectors = kBlock / kLanes;
  Vector sum[kVectors] = {};
  for (int64_t u = 0; u < count; ++u, planes += size, factors += step)
    for (int j = 0; j < kVectors; ++j) sum[j] += *factors * reinterpret_cast<const Vector*>(planes)[j];
  for (int j = 0; j < kVectors; ++j) reinterpret_cast<Vector*>(out)[j] += sum[j];
}

// C and S of every wave, one after the other, += sums of folded blocks.
template <int kLanes>
struct Waves {
  ISONET_FAST_INLINE void operator()(int64_t count, int64_t blocks, int64_t length, int64_t size, const float* waves,
                                     const float* folded, float* out) const {
    const int64_t even = (blocks + 1) / 2;
    for (int64_t i = 0; i < length; i += kBlock)
      for (int64_t w = 0; w < count; ++w) {
        const float* const wave = waves + w * blocks;
        combine<kLanes>(even, wave, 1, folded + i, size, out + 2 * w * size + i);
        combine<kLanes>(blocks - even, wave + even, 1, folded + even * size + i, size, out + (2 * w + 1) * size + i);
      }
  }
};

// The transpose of Waves: the gradient of folded blocks += sums of what lies in the places of C and S.
template <int kLanes>
struct WavesBack {
  ISONET_FAST_INLINE void operator()(int64_t count, int64_t blocks, int64_t length, int64_t size, const float* waves,
                                     const float* in, float* grad) const {
    const int64_t even = (blocks + 1) / 2;
    for (int64_t i = 0; i < length; i += kBlock)
      for (int64_t u = 0; u < blocks; ++u)
        combine<kLanes>(count, waves + u, blocks, in + (u < even ? 0 : size) + i, 2 * size, grad + u * size + i);
  }
};

// X, Z, and -S in the place of S.
struct Rotate {
  ISONET_FAST_INLINE void operator()(int64_t length, const float* c, float* s, float* x, float* z) const {
    for (int64_t i = 0; i < length; ++i) {
      x[i] = c[i] + s[i];
      z[i] = c[i] - s[i];
      s[i] = -s[i];
    }
  }
};

// Re R and -Im R of U (stride x stride), and the sum of the squares.
struct Split {
  ISONET_FAST_INLINE void operator()(int64_t stride, const float* u, float* re, float* im, double& total) const {
    for (int64_t i = 0; i < stride; i += 8)
      for (int64_t j = 0; j < stride; j += 8) {
        Vector8 there[8];
        transpose(u + j * stride + i, stride, there);
        for (int k = 0; k < 8; ++k) {
          const int64_t at = (i + k) * stride + j;
          const Vector8 here = *reinterpret_cast<const Vector8*>(u + at);
          *reinterpret_cast<Vector8*>(re + at) = 0.5f * (there[k] + here);
          *reinterpret_cast<Vector8*>(im + at) = 0.5f * (there[k] - here);
        }
      }
    total = sum_of_squares(u, stride * stride);
  }
};

// The diagonal of C C^T + S S^T - I, to u (stride x stride), summed in float64 in `sums` (stride). A product's running sum
// is near one there, and loses the last bits of the small squares that it still meets.
struct Diagonal {
  ISONET_FAST_INLINE void operator()(int64_t rows, int64_t columns, int64_t stride, const float* c, const float* s,
                                     double* sums, float* u) const {
    std::fill(sums, sums + stride, -1.0);
    for (int64_t n = 0; n < columns; ++n, c += stride, s += stride)
      for (int64_t m = 0; m < stride; ++m) sums[m] += double(c[m]) * double(c[m]) + double(s[m]) * double(s[m]);
    for (int64_t m = 0; m < rows; ++m) u[m * stride + m] = static_cast<float>(sums[m]);
  }
};

// c = factor y, s = -factor y
struct Start {
  ISONET_FAST_INLINE void operator()(int64_t length, float factor, const float* y, float* c, float* s) const {
    for (int64_t i = 0; i < length; ++i) {
      c[i] = factor * y[i];
      s[i] = -c[i];
    }
  }
};

inline int64_t frequencies_at_once(const Plan& plan) {
  return std::min(plan.layer.count, std::max<int64_t>(1, kSlice / (2 * plan.size + 1)));
}

inline int64_t frequency_scratch(const Plan& plan) {
  return 3 * plan.size + 3 * plan.square() + 2 * frequencies_at_once(plan) * plan.size;
}

// || R ||_F^2 of one frequency, and Re(R B) and Im(R B) over C and S, if wanted.
inline double compute_at(const Plan& plan, bool zero, bool want_grad, float* c, float* s, float* scratch) {
  const int64_t rows = plan.rows, columns = plan.columns, stride = plan.stride, size = plan.size;
  float *const x = scratch, *const z = x + size, *const y = z + size;
  float *const u = y + size, *const re = u + plan.square(), *const im = re + plan.square();
  std::fill(u, u + plan.square(), 0.0f);
  for (int64_t m = 0; m < rows; ++m) u[m * stride + m] = -1;
  if (zero) {
    multiply<true>(rows, columns, c, c, u, stride);
  } else {
    run(Rotate{}, plan.length, c, s, x, z);
    multiply<true>(rows, columns, c, x, u, stride);
    multiply<true>(rows, columns, s, z, u, stride);
  }
  run(Diagonal{}, rows, columns, stride, c, s, reinterpret_cast<double*>(re), u);
  double square;
  run(Split{}, stride, u, re, im, square);
  if (want_grad) {
    std::fill(y, y + size, 0.0f);
    multiply<false>(columns, rows, c, u, y, stride);
    run(Start{}, plan.length, zero ? 0.5f : 1.0f, y, c, s);
    if (!zero) {
      multiply<false>(columns, rows, x, im, c, stride);
      multiply<false>(columns, rows, z, re, s, stride);
    }
  }
  return square;
}

// The loss of one group. Half of its gradient, if wanted, is added to `grad`, which holds zeros; `packed` is overwritten.
inline double compute_frequency(const Plan& plan, float* packed, float* grad, float* scratch) {
  const OrthogonalityLayer& layer = plan.layer;
  const int64_t blocks = plan.blocks, size = plan.size, step = frequencies_at_once(plan);
  float* const slice = scratch + 3 * size + 3 * plan.square();
  double n = 1, squares = 0;
  for (int d = 0; d < 3; ++d) n *= 2 * ((layer.kernel[d] + layer.phases[d] - 1) / layer.phases[d]) - 1;
  run(Fold{}, blocks, plan.length, size, packed);
  for (int64_t first = 0; first < layer.count; first += step) {
    const int64_t count = std::min(step, layer.count - first);
    const float* const waves = layer.waves + first * blocks;
    std::fill(slice, slice + 2 * count * size, 0.0f);
    run_vectors<Waves>(count, blocks, plan.length, size, waves, packed, slice);
    for (int64_t w = 0; w < count; ++w) {
      const bool zero = is_zero(layer.units + 3 * (first + w));
      float* const c = slice + 2 * w * size;
      squares += (zero ? 1 : 2) * compute_at(plan, zero, grad != nullptr, c, c + size, scratch);
    }
    if (grad != nullptr) run_vectors<WavesBack>(count, blocks, plan.length, size, waves, slice, grad);
  }
  // Half of the gradient is the sum over all w, divided by n. Each w here stands for w and -w; compute_at halved w = 0.
  if (grad != nullptr) run(Unfold{}, blocks, plan.length, size, static_cast<float>(2 / n), grad);
  return squares / (2 * n);
}

}  // namespace isonet_fast::cpu
