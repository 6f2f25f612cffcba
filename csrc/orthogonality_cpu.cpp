// The orthogonality penalty and its gradient for small float32 layers on the CPU: one call for a whole network.
//
// A penalty of 16 to 64 channels is a few hundred multiplications of matrices that fit in the first-level cache. As
// operations of torch each costs more to start, and its operands more to slice, transpose and add, than to multiply.
// Here a thread takes a layer's group, packs its taps, and keeps taps, gradient and residual in its cache
// until the group is done. Groups are independent and each keeps its own sum: the same bits for any number of threads.
//
// A tap is packed as its transpose, columns x rows, with the rows padded to eight floats by zeros. Taps that follow
// each other in the kernel's last dimension lie one below the other, so that a run of them is one matrix:
//   R    += A_u A_v^T    = P_u^T P_v      over (taps of the run, columns)
//   G_u  += (R A_v)^T    = P_v R^T        G_v += (R^T A_u)^T = P_u R        for all taps of the run at once
// Every product has its right factor and its result in rows of one length: one kernel serves all.
#include "orthogonality.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <memory>
#include <new>

#include "simd_dispatch.h"

namespace isonet_fast::cpu {
namespace {

constexpr int64_t kPadding = 8;  // floats to which rows are filled up: a vector, or half of the longest
// So many products are added before they join the result: it is a small difference of larger numbers, and fewer
// roundings are of the size of those.
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

// The sum of the squares, and the transpose.
struct Square {
  ISONET_FAST_INLINE void operator()(int64_t rows, int64_t stride, const float* r, float* transpose,
                                     double& total) const {
    double sum = 0;
    for (int64_t i = 0; i < rows; ++i) {
#pragma omp simd reduction(+ : sum)
      for (int64_t j = 0; j < rows; ++j) sum += double(r[i * stride + j]) * double(r[i * stride + j]);
      for (int64_t j = 0; j < rows; ++j) transpose[j * stride + i] = r[i * stride + j];
    }
    total = sum;
  }
};

// Where the elements of some dimensions lie, the last dimension fastest.
std::vector<int64_t> places(const int64_t* sizes, const int64_t* strides, int64_t dims) {
  std::vector<int64_t> result{0};
  for (int64_t d = 0; d < dims; ++d) {
    std::vector<int64_t> outer;
    outer.swap(result);
    for (const int64_t place : outer)
      for (int64_t i = 0; i < sizes[d]; ++i) result.push_back(place + i * strides[d]);
  }
  return result;
}

// Where the elements of a tensor (O, I/groups, k...) lie: the sum of the places of its group, row, column and tap.
struct Places {
  std::vector<int64_t> rows, columns, taps;
  int64_t group;

  Places(const OrthogonalityLayer& layer, const int64_t* strides) {
    const int64_t outputs = layer.sizes[0] / layer.groups, split = layer.one_tap ? layer.dims : 2;
    rows = places(&outputs, strides, 1);
    columns = places(layer.sizes + 1, strides + 1, split - 1);
    taps = places(layer.sizes + split, strides + split, layer.dims - split);
    if (layer.transposed) rows.swap(columns);
    group = outputs * strides[0];
  }
};

// What the groups of a layer share.
struct Plan {
  const OrthogonalityLayer& layer;
  const Places weight, grad;
  const int64_t rows, columns, taps;
  const int64_t stride;  // the rows, filled up to whole vectors
  const int64_t tap;     // the length of a packed tap

  explicit Plan(const OrthogonalityLayer& layer)
      : layer(layer),
        weight(layer, layer.weight_strides),
        grad(layer, layer.grad == nullptr ? layer.weight_strides : layer.grad_strides),
        rows(weight.rows.size()),
        columns(weight.columns.size()),
        taps(weight.taps.size()),
        stride((rows + kPadding - 1) / kPadding * kPadding),
        tap(columns * stride) {}

  int64_t scratch() const { return 2 * taps * tap + 2 * rows * stride; }
  // With few rows few errors average out, and the work is small: the residual is summed in float64.
  bool thin() const { return rows <= kPadding; }
  int64_t work() const { return layer.count * taps * tap * rows; }
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
void compute_residual(const Plan& plan, const int64_t* t, bool zero, const float* packed, float* residual) {
  const int64_t rows = plan.rows, stride = plan.stride, tap = plan.tap;
  const float one = zero ? 1 : 0;
  if (plan.thin()) {
    double sums[kPadding * kPadding] = {};
    for (int64_t m = 0; m < rows; ++m) sums[m * kPadding + m] = -one;
    for_runs(plan.layer.kernel, t, [&](int64_t u, int64_t v, int64_t length) {
      run(MultiplyThin{}, rows, length * plan.columns, packed + u * tap, packed + v * tap, sums);
    });
    std::copy(sums, sums + rows * stride, residual);
  } else {
    std::fill(residual, residual + rows * stride, 0.0f);
    for (int64_t m = 0; m < rows; ++m) residual[m * stride + m] = -one;
    for_runs(plan.layer.kernel, t, [&](int64_t u, int64_t v, int64_t length) {
      multiply<true>(rows, length * plan.columns, packed + u * tap, packed + v * tap, residual, stride);
    });
  }
}

// The loss of one group; its gradient, if wanted, goes to the tensor.
double compute(const Plan& plan, int64_t group, bool add, float* scratch) {
  const OrthogonalityLayer& layer = plan.layer;
  const int64_t rows = plan.rows, columns = plan.columns, stride = plan.stride, tap = plan.tap;
  float *const packed = scratch, *const grad = packed + plan.taps * tap;
  float *const residual = grad + plan.taps * tap, *const transpose = residual + rows * stride;
  std::fill(scratch, scratch + plan.scratch(), 0.0f);

  const float* const weight = layer.weight + group * plan.weight.group;
  for (int64_t m = 0; m < rows; ++m)
    for (int64_t u = 0; u < plan.taps; ++u)
      for (int64_t n = 0; n < columns; ++n)
        packed[u * tap + n * stride + m] = weight[plan.weight.rows[m] + plan.weight.columns[n] + plan.weight.taps[u]];

  double loss = 0;
  for (const int64_t* t = layer.offsets; t < layer.offsets + 3 * layer.count; t += 3) {
    const bool zero = t[0] == 0 && t[1] == 0 && t[2] == 0;
    compute_residual(plan, t, zero, packed, residual);
    double square;
    run(Square{}, rows, stride, residual, transpose, square);
    loss += zero ? square / 2 : square;
    if (layer.grad == nullptr) continue;
    for_runs(layer.kernel, t, [&](int64_t u, int64_t v, int64_t length) {
      multiply<false>(length * columns, rows, packed + v * tap, transpose, grad + u * tap, stride);
      if (!zero) multiply<false>(length * columns, rows, packed + u * tap, residual, grad + v * tap, stride);
    });
  }

  if (layer.grad != nullptr) {
    float* const out = layer.grad + group * plan.grad.group;
    const float scale = 2 * layer.scale;
    for (int64_t m = 0; m < rows; ++m)
      for (int64_t u = 0; u < plan.taps; ++u)
        for (int64_t n = 0; n < columns; ++n) {
          float& value = out[plan.grad.rows[m] + plan.grad.columns[n] + plan.grad.taps[u]];
          const float term = scale * grad[u * tap + n * stride + m];
          value = add ? value + term : term;
        }
  }
  return loss;
}

struct Unit {
  const Plan* plan;
  int64_t layer, group;
  double loss;
};

struct Free {
  void operator()(float* p) const { std::free(p); }
};

std::unique_ptr<float, Free> aligned_floats(int64_t count) {
  void* const memory = std::aligned_alloc(64, (count * sizeof(float) + 64) / 64 * 64);
  if (memory == nullptr) throw std::bad_alloc();
  return std::unique_ptr<float, Free>(static_cast<float*>(memory));
}

}  // namespace

void orthogonality(const std::vector<OrthogonalityLayer>& layers, bool add, double* losses) {
  const std::vector<Plan> plans(layers.begin(), layers.end());
  std::vector<Unit> units;
  int64_t scratch = 0;
  for (size_t n = 0; n < plans.size(); ++n) {
    scratch = std::max(scratch, plans[n].scratch());
    for (int64_t group = 0; group < layers[n].groups; ++group)
      units.push_back({&plans[n], static_cast<int64_t>(n), group, 0.0});
  }
  // The longest first, each to the thread that is free: little is left when the threads run out of work.
  std::stable_sort(units.begin(), units.end(),
                   [](const Unit& a, const Unit& b) { return a.plan->work() > b.plan->work(); });
  std::atomic<size_t> next{0};
  const int64_t threads = std::min<int64_t>(torch::stable::get_num_threads(), units.size());
  torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    const auto memory = aligned_floats(scratch);
    for (size_t n; (n = next++) < units.size();)
      units[n].loss = compute(*units[n].plan, units[n].group, add, memory.get());
  });
  std::fill(losses, losses + layers.size(), 0.0);
  for (const Unit& unit : units) losses[unit.layer] += unit.loss;
}

}  // namespace isonet_fast::cpu
