// Products of packed matrices in cache, for the orthogonality penalty of small layers (orthogonality_cpu.cpp).
//
// All three matrices of a product have rows of one length, filled up with zeros to whole vectors of eight floats.
#pragma once

#include <cstdint>

#include "simd_dispatch.h"

namespace isonet_fast::cpu {

constexpr int64_t kPadding = 8;  // floats to which rows are filled up: a vector, or half of the longest
constexpr int64_t kBlock = 64;   // floats that a pass over planes keeps in registers
// This many products are summed in registers before they are added to the result c. c is a small difference of large
// numbers, so fewer additions to it mean less rounding error.
constexpr int64_t kDepth = 64;

template <int kLanes>
struct VectorOf {
  // Rows are padded to eight floats: a vector of 16 may start in the middle of its own length.
  typedef float Type __attribute__((vector_size(4 * kLanes), aligned(4 * (kLanes < 8 ? kLanes : 8)), may_alias));
};

// c (kRows x kVectors) += a b, with the sums in registers. All three have rows of `stride`; a may be given transposed.
template <int kLanes, bool kTransposed, int kRows, int kVectors>
ISONET_FAST_INLINE void multiply_tile(int64_t depth, const float* a, const float* b, float* c, int64_t stride) {
  using Vector = typename VectorOf<kLanes>::Type;
  Vector sum[kRows][kVectors] = {};
  for (int64_t k = 0; k < depth; ++k, a += kTransposed ? stride : 1, b += stride) {
    const Vector* const right = reinterpret_cast<const Vector*>(b);
    for (int i = 0; i < kRows; ++i)
      for (int j = 0; j < kVectors; ++j) sum[i][j] += a[kTransposed ? i : i * stride] * right[j];
  }
  for (int i = 0; i < kRows; ++i)
    for (int j = 0; j < kVectors; ++j) *reinterpret_cast<Vector*>(c + i * stride + j * kLanes) += sum[i][j];
}

template <int kLanes, bool kTransposed, int kRows, int kVectors>
ISONET_FAST_INLINE void multiply_rows(int64_t rows, int64_t depth, const float* a, const float* b, float* c,
                                      int64_t stride) {
  if (rows == kRows) return multiply_tile<kLanes, kTransposed, kRows, kVectors>(depth, a, b, c, stride);
  if constexpr (kRows > 1) multiply_rows<kLanes, kTransposed, kRows - 1, kVectors>(rows, depth, a, b, c, stride);
}

template <int kLanes, bool kTransposed, int kVectors>
ISONET_FAST_INLINE void multiply_panel(int64_t rows, int64_t depth, const float* a, const float* b, float* c,
                                       int64_t stride) {
  // As many rows at a time as registers hold, and the same number again and again rather than a short last tile.
  constexpr int kMost = kLanes == 16 ? 12 : 6;
  for (int64_t tiles = (rows + kMost - 1) / kMost; tiles > 0; --tiles) {
    const int64_t height = (rows + tiles - 1) / tiles;
    multiply_rows<kLanes, kTransposed, kMost, kVectors>(height, depth, a, b, c, stride);
    rows -= height;
    a += height * (kTransposed ? 1 : stride);
    c += height * stride;
  }
}

// c (rows x stride) += a b: a is rows x depth, or depth x rows if transposed.
template <int kLanes, bool kTransposed>
struct Multiply {
  ISONET_FAST_INLINE void operator()(int64_t rows, int64_t depth, const float* a, const float* b, float* c,
                                     int64_t stride) const {
    for (; depth > 0; depth -= kDepth, a += kDepth * (kTransposed ? stride : 1), b += kDepth * stride) {
      const int64_t d = depth < kDepth ? depth : kDepth;
      int64_t j = 0;
      for (; stride - j >= 2 * kLanes; j += 2 * kLanes)
        multiply_panel<kLanes, kTransposed, 2>(rows, d, a, b + j, c + j, stride);
      for (; stride - j >= kLanes; j += kLanes)
        multiply_panel<kLanes, kTransposed, 1>(rows, d, a, b + j, c + j, stride);
      if constexpr (kLanes > kPadding)
        if (stride > j) multiply_panel<kPadding, kTransposed, 1>(rows, d, a, b + j, c + j, stride);
    }
  }
};

template <bool kTransposed>
void multiply(int64_t rows, int64_t depth, const float* a, const float* b, float* c, int64_t stride) {
#ifdef ISONET_FAST_AVX
  if (has_avx512()) return run_avx512(Multiply<16, kTransposed>{}, rows, depth, a, b, c, stride);
  if (has_avx2()) return run_avx2(Multiply<8, kTransposed>{}, rows, depth, a, b, c, stride);
#endif
  Multiply<4, kTransposed>{}(rows, depth, a, b, c, stride);  // compilers handle vectors longer than registers badly
}

using Vector8 = VectorOf<8>::Type;

#ifdef __clang__
#define ISONET_FAST_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
typedef int32_t Places8 __attribute__((vector_size(32)));
#define ISONET_FAST_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, Places8{__VA_ARGS__})
#endif

// The transpose of an 8 x 8 block of a matrix.
ISONET_FAST_INLINE void transpose(const float* from, int64_t stride, Vector8 (&rows)[8]) {
  Vector8 pairs[8], fours[8];
  for (int i = 0; i < 8; ++i) rows[i] = *reinterpret_cast<const Vector8*>(from + i * stride);
  for (int i = 0; i < 8; i += 2) {
    pairs[i] = ISONET_FAST_SHUFFLE(rows[i], rows[i + 1], 0, 8, 1, 9, 4, 12, 5, 13);
    pairs[i + 1] = ISONET_FAST_SHUFFLE(rows[i], rows[i + 1], 2, 10, 3, 11, 6, 14, 7, 15);
  }
  for (int i = 0; i < 8; i += 4)
    for (int j = 0; j < 2; ++j) {
      fours[i + 2 * j] = ISONET_FAST_SHUFFLE(pairs[i + j], pairs[i + 2 + j], 0, 1, 8, 9, 4, 5, 12, 13);
      fours[i + 2 * j + 1] = ISONET_FAST_SHUFFLE(pairs[i + j], pairs[i + 2 + j], 2, 3, 10, 11, 6, 7, 14, 15);
    }
  for (int i = 0; i < 4; ++i) {
    rows[i] = ISONET_FAST_SHUFFLE(fours[i], fours[i + 4], 0, 1, 2, 3, 8, 9, 10, 11);
    rows[i + 4] = ISONET_FAST_SHUFFLE(fours[i], fours[i + 4], 4, 5, 6, 7, 12, 13, 14, 15);
  }
}

ISONET_FAST_INLINE double sum_of_squares(const float* x, int64_t count) {
  double sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < count; ++i) sum += double(x[i]) * double(x[i]);
  return sum;
}

// Runs a body that is written for vectors of any length, with the longest of this machine.
template <template <int> class Body, class... Arguments>
void run_vectors(const Arguments&... arguments) {
#ifdef ISONET_FAST_AVX
  if (has_avx512()) return run_avx512(Body<16>{}, arguments...);
  if (has_avx2()) return run_avx2(Body<8>{}, arguments...);
#endif
  Body<4>{}(arguments...);
}

}  // namespace isonet_fast::cpu
