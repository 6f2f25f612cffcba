// The elementwise kernels on the GPU. Two serve every op; their template argument, a formula (srelu.h), says what is
// computed for one element.
//
// planes_kernel   NCHW: a block belongs to one channel and reads that channel's planes as one list of
//                 16-byte vectors. It needs one bias value and keeps one running sum.
// columns_kernel  everything else: memory as a matrix whose columns are (channel, inner) positions and whose
//                 rows are the outer index. A thread owns 16 bytes of columns and goes through the rows, so the
//                 bias values and the partial sums of its columns never leave its registers. channels_last is
//                 the case inner = 1. Small or odd planes (7 x 7) are the other: no plane ever wastes a block,
//                 and no plane's odd length costs the 16-byte access, because vectors may straddle planes.
//
// What makes it fast: these ops are pure memory traffic, so a thread asks for 4 to 6 vectors of 16 bytes before it
// uses the first (kRounds), divisions are two multiplications (Divide) once per vector or per thread, and the
// grid is thousands of equal blocks. The first blocks take the end of the tensor, which the convolution before wrote
// last and the cache still holds. The last blocks take its start, which the convolution after reads first. A backward
// reads its inputs for the last time, so that they need not stay in the cache (load); its outputs, and y, are the next
// convolution's inputs.
//
// What makes it deterministic: a block writes its sums to its own partial row; finish_kernel adds the rows in a
// fixed order. No atomics. The partition depends only on the shape (partition.h), not on the GPU.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstring>
#include <type_traits>

#include "partition.h"

// tests/emulator/ compiles this file with g++ and defines these three itself.
#ifndef ISONET_FAST_EMULATED
#define ISONET_FAST_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  kernel<<<grid, block, shared_bytes, stream>>>(__VA_ARGS__)
#define ISONET_FAST_SHARED(type, name)                      \
  extern __shared__ __align__(16) unsigned char name##_raw[]; \
  type* const name = reinterpret_cast<type*>(name##_raw)
#define ISONET_FAST_COUNT(what, bytes)
// Programmatic dependent launch: a grid may start while the one before it still runs, once all blocks of that one have
// called the first. What those blocks write can be read after the second.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
#define ISONET_FAST_LET_NEXT_GRID_START() asm volatile("griddepcontrol.launch_dependents;")
#define ISONET_FAST_AWAIT_GRID() asm volatile("griddepcontrol.wait;" ::: "memory")
#else
#define ISONET_FAST_LET_NEXT_GRID_START()
#define ISONET_FAST_AWAIT_GRID()
#endif
#endif

namespace isonet_fast {

template <DType type, typename A = float>
struct ElementOf {
  using Sum = A;
  static constexpr DType kDType = type;
};
template <typename T>
struct Element;
template <>
struct Element<float> : ElementOf<DType::float32> {};
template <>
struct Element<double> : ElementOf<DType::float64, double> {};
template <>
struct Element<__half> : ElementOf<DType::float16> {};
template <>
struct Element<__nv_bfloat16> : ElementOf<DType::bfloat16> {};

// Every access to a tensor goes through these two, so that the emulator can count bytes.
template <typename T, int V>
struct alignas(sizeof(T) * V) Vector {
  T element[V];
};

// A vector as it is loaded: kept whole until its elements are used (a half word costs a register).
template <typename T, int V>
struct Loaded {
  static constexpr size_t kBytes = sizeof(T) * V;
  using Small = std::conditional_t<kBytes == 4, uint32_t, uint16_t>;
  using Word = std::conditional_t<kBytes == 16, uint4, std::conditional_t<kBytes == 8, uint2, Small>>;
  static_assert(sizeof(Word) == kBytes);
  Word word;
  __device__ __forceinline__ Vector<T, V> elements() const {
    Vector<T, V> vector;
    memcpy(&vector, &word, sizeof(vector));
    return vector;
  }
};

template <typename T, int V, bool kLast = false>
__device__ __forceinline__ Loaded<T, V> load(const T* address) {
  ISONET_FAST_COUNT(read, sizeof(T) * V);
  const auto* const word = reinterpret_cast<const typename Loaded<T, V>::Word*>(address);
#ifdef __CUDA_ARCH__
  if constexpr (kLast) return {__ldcs(word)};  // the first to leave the cache
#endif
  return {*word};
}

template <typename T, int V>
__device__ __forceinline__ void store(T* address, const Vector<T, V>& value) {
  ISONET_FAST_COUNT(written, sizeof(T) * V);
  *reinterpret_cast<Vector<T, V>*>(address) = value;
}

template <typename T>
struct Operands {
  const T* in[3];
  T* out[2];
  Parameter bias;
  Parameter scale;
};

// One partial sum per (split, tile, slot) for the bias, one per block for the scale.
template <typename A>
struct Partials {
  A* bias;
  A* scale;
};

// b is rounded to the tensor's dtype: the mask recomputed from a rounded y would be wrong otherwise.
template <typename T>
__device__ __forceinline__ typename Element<T>::Sum bias_at(const Parameter& bias, int64_t channel) {
  using A = typename Element<T>::Sum;
  ISONET_FAST_COUNT(parameters, size_of(bias.dtype));
  if (bias.dtype == Element<T>::kDType) return static_cast<A>(static_cast<const T*>(bias.data)[channel]);
  return static_cast<A>(static_cast<T>(static_cast<const float*>(bias.data)[channel]));
}

// The scale is not rounded: the product is formed in A. No scale means 1.
template <typename T>
__device__ __forceinline__ typename Element<T>::Sum scale_value(const Parameter& scale) {
  using A = typename Element<T>::Sum;
  if (scale.data == nullptr) return A(1);
  ISONET_FAST_COUNT(parameters, size_of(scale.dtype));
  if (scale.dtype == Element<T>::kDType) return static_cast<A>(*static_cast<const T*>(scale.data));
  return static_cast<A>(*static_cast<const float*>(scale.data));
}

// What a thread keeps from its first element to its last.
template <typename T, int V>
struct Registers {
  using A = typename Element<T>::Sum;
  A b[V];
  A scale = A(1);
  A grad_bias[V] = {};
  A grad_scale = A(0);
};

// Apply the formula to N consecutive elements at `at`.
template <class Formula, typename T, int V, int N>
__device__ __forceinline__ void apply(const Operands<T>& operands, int64_t at,
                                      const Loaded<T, N> (&in)[Formula::kReads], Registers<T, V>& r, int first = 0) {
  using A = typename Element<T>::Sum;
  Vector<T, N> out[Formula::kWrites];
#pragma unroll
  for (int v = 0; v < N; ++v) {
    A values[Formula::kReads], results[Formula::kWrites];
#pragma unroll
    for (int k = 0; k < Formula::kReads; ++k) values[k] = static_cast<A>(in[k].elements().element[v]);
    Formula::apply(values, r.b[first + v], r.scale, results, r.grad_bias[first + v], r.grad_scale);
#pragma unroll
    for (int k = 0; k < Formula::kWrites; ++k) out[k].element[v] = static_cast<T>(results[k]);
  }
#pragma unroll
  for (int k = 0; k < Formula::kWrites; ++k) store<T, N>(operands.out[k] + at, out[k]);
}

// The sum over the block, in thread 0; every thread of the block must call it. `shared` holds 32 values.
template <typename A>
__device__ __forceinline__ A block_sum(A value, A* shared) {
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) value += __shfl_down_sync(0xffffffffu, value, lanes);
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = value;
  __syncthreads();
  A total = A(0);
  if (threadIdx.x == 0)
    for (int warp = 0; warp < static_cast<int>(blockDim.x) / 32; ++warp) total += shared[warp];
  __syncthreads();  // the caller may use `shared` again
  return total;
}

template <typename A>
__device__ __forceinline__ void write_partial(A* address, A value) {
  ISONET_FAST_COUNT(partials_written, sizeof(A));
  *address = value;
}

// Vectors per tensor that a thread asks for at once. 4 to 6 loads of 16 bytes in flight in 768 threads or more are 64 KB
// per multiprocessor or more; an H200 needs about 30 KB to cover its latency (4.8 TB/s x 0.8 us / 132). With twice as
// many, registers halve the threads, and some kernels spill.
template <class Formula>
constexpr int kRounds = Formula::kReads == 1 ? 4 : 2;

// Blocks that must fit a multiprocessor at once. Left to itself, ptxas gives columns_kernel fewer registers than four
// blocks leave it, and SReLU's spills on sm_120. 0 asks for nothing: other formulas would spill, or lose a fifth block.
template <class Formula>
constexpr int kBlocks = Formula::kReads == 1 ? 4 : 0;

template <typename T, int V, class Formula>
__global__ void __launch_bounds__(kThreads)
    planes_kernel(Operands<T> operands, Partition p, Partials<typename Element<T>::Sum> partials) {
  using A = typename Element<T>::Sum;
  constexpr int U = kRounds<Formula>;
  if constexpr (Formula::kSumsBias) ISONET_FAST_LET_NEXT_GRID_START();  // finish_kernel's
  const int64_t block = gridDim.x - 1 - blockIdx.x;
  const int64_t split = p.by_tiles(block), channel = block - split * p.tiles;
  const int64_t begin = split * p.span, end = begin + p.span < p.length ? begin + p.span : p.length;

  Registers<T, V> r;
  r.scale = scale_value<T>(operands.scale);
  r.b[0] = bias_at<T>(operands.bias, channel);
#pragma unroll
  for (int v = 1; v < V; ++v) r.b[v] = r.b[0];

  for (int64_t first = begin + threadIdx.x; first < end; first += U * kThreads) {
    Loaded<T, V> in[U][Formula::kReads];
    int64_t at[U];
#pragma unroll
    for (int u = 0; u < U; ++u) {
      const int64_t i = first + u * kThreads, outer = p.by_plane(i);
      at[u] = ((outer * p.channels + channel) * p.plane + (i - outer * p.plane)) * V;
#pragma unroll
      for (int k = 0; k < Formula::kReads; ++k)
        if (i < end) in[u][k] = load<T, V, Formula::kSumsBias>(operands.in[k] + at[u]);
    }
#pragma unroll
    for (int u = 0; u < U; ++u)
      if (first + u * kThreads < end) apply<Formula>(operands, at[u], in[u], r);
  }

  if constexpr (Formula::kSumsBias) {
    ISONET_FAST_SHARED(A, shared);
    A sum = r.grad_bias[0];
#pragma unroll
    for (int v = 1; v < V; ++v) sum += r.grad_bias[v];
    sum = block_sum(sum, shared);
    if (threadIdx.x == 0) write_partial(partials.bias + block, sum);
    if constexpr (Formula::kSumsScale) {
      const A scale_sum = block_sum(r.grad_scale, shared);
      if (threadIdx.x == 0) write_partial(partials.scale + block, scale_sum);
    }
  }
}

template <typename T, int V, class Formula>
__global__ void __launch_bounds__(kThreads, kBlocks<Formula>)
    columns_kernel(Operands<T> operands, Partition p, Partials<typename Element<T>::Sum> partials) {
  using A = typename Element<T>::Sum;
  constexpr int U = kRounds<Formula>;
  if constexpr (Formula::kSumsBias) ISONET_FAST_LET_NEXT_GRID_START();  // finish_kernel's
  const int64_t block = gridDim.x - 1 - blockIdx.x;
  const int64_t split = p.by_tiles(block), tile = block - split * p.tiles;
  const int64_t begin = split * p.span, end = begin + p.span < p.length ? begin + p.span : p.length;
  const int y = threadIdx.x / p.tile_columns, x = threadIdx.x - y * p.tile_columns;
  const int64_t column = tile * p.tile_columns + x;
  const int64_t first_channel = p.by_inner(tile * p.tile_columns * V);  // counts through repeats of the channels

  Registers<T, V> r;
  if (y < p.tile_rows && column < p.columns) {
    r.scale = scale_value<T>(operands.scale);
    int64_t channel = p.by_inner(column * V), position = column * V - channel * p.inner;
    channel -= p.by_channels(channel) * p.channels;
#pragma unroll
    for (int v = 0; v < V; ++v) {
      r.b[v] = bias_at<T>(operands.bias, channel);
      if (++position == p.inner) {
        position = 0;
        if (++channel == p.channels) channel = 0;
      }
    }
    const int64_t whole = p.tail_row + (column < p.tail_column);  // rows in which this column holds a whole vector
    const int64_t stop = end < whole ? end : whole;
    for (int64_t first = begin + y; first < stop; first += U * p.tile_rows) {
      Loaded<T, V> in[U][Formula::kReads];
#pragma unroll
      for (int u = 0; u < U; ++u) {
        const int64_t row = first + u * p.tile_rows, i = row * p.columns + column;
#pragma unroll
        for (int k = 0; k < Formula::kReads; ++k)
          if (row < stop) in[u][k] = load<T, V, Formula::kSumsBias>(operands.in[k] + i * V);
      }
#pragma unroll
      for (int u = 0; u < U; ++u) {
        const int64_t row = first + u * p.tile_rows, i = row * p.columns + column;
        if (row < stop) apply<Formula>(operands, i * V, in[u], r);
      }
    }
    // The elements after the last whole vector, one by one, by the thread to which that vector would belong.
    if (V > 1 && p.tail > 0 && column == p.tail_column && p.tail_row >= begin && p.tail_row < end &&
        (p.tail_row - begin) % p.tile_rows == y) {
#pragma unroll
      for (int v = 0; v < V; ++v) {
        if (v < p.tail) {
          Loaded<T, 1> in[Formula::kReads];
#pragma unroll
          for (int k = 0; k < Formula::kReads; ++k) in[k] = load<T, 1, Formula::kSumsBias>(operands.in[k] + p.vectors * V + v);
          apply<Formula>(operands, p.vectors * V + v, in, r, v);
        }
      }
    }
  }

  if constexpr (Formula::kSumsBias) {
    // Registers to shared memory, rows of threads to one, then columns of one channel to one value.
    ISONET_FAST_SHARED(A, shared);
    const int width = p.tile_columns * V;
    A* const sums = shared + 32;
    if (y < p.tile_rows) {
#pragma unroll
      for (int v = 0; v < V; ++v) sums[y * width + x * V + v] = r.grad_bias[v];
    }
    __syncthreads();
    for (int rows = p.tile_rows; rows > 1;) {  // by halves: pairwise sums are accurate, and every thread works
      const int kept = (rows + 1) / 2;
      for (int i = threadIdx.x; i < (rows - kept) * width; i += blockDim.x) sums[i] += sums[kept * width + i];
      rows = kept;
      __syncthreads();
    }
    A* const row = partials.bias + block * p.slots;
    if (p.inner == 1) {
      for (int c = threadIdx.x; c < width; c += blockDim.x) write_partial(row + c, sums[c]);
    } else {
      const int lane = threadIdx.x % 32;
      for (int slot = threadIdx.x / 32; slot < p.slots; slot += blockDim.x / 32) {
        const int64_t start = (first_channel + slot) * p.inner - tile * width;  // may lie before or after the tile
        const int64_t stop = start + p.inner;
        A total = A(0);
        for (int64_t c = (start > 0 ? start : 0) + lane; c < (stop < width ? stop : width); c += 32) total += sums[c];
#pragma unroll
        for (int lanes = 16; lanes > 0; lanes /= 2) total += __shfl_down_sync(0xffffffffu, total, lanes);
        if (lane == 0) write_partial(row + slot, total);
      }
    }
    if constexpr (Formula::kSumsScale) {
      const A scale_sum = block_sum(r.grad_scale, shared);
      if (threadIdx.x == 0) write_partial(partials.scale + block, scale_sum);
    }
  }
}

struct Gradient {
  void* data;
  DType dtype;
};

template <typename A>
__device__ __forceinline__ void write_gradient(const Gradient& gradient, int64_t i, A value) {
  ISONET_FAST_COUNT(parameters, size_of(gradient.dtype));
  switch (gradient.dtype) {
    case DType::float32: static_cast<float*>(gradient.data)[i] = static_cast<float>(value); break;
    case DType::float64: static_cast<double*>(gradient.data)[i] = static_cast<double>(value); break;
    case DType::float16: static_cast<__half*>(gradient.data)[i] = static_cast<__half>(value); break;
    case DType::bfloat16: static_cast<__nv_bfloat16*>(gradient.data)[i] = static_cast<__nv_bfloat16>(value); break;
  }
}

// This thread's share of n partial sums, four loads at a time.
template <typename A, class At>
__device__ __forceinline__ A strided_sum(int64_t n, At at) {
  A sums[4] = {};
  for (int64_t i = threadIdx.x; i < n; i += 4 * blockDim.x) {
#pragma unroll
    for (int u = 0; u < 4; ++u)
      if (i + u * blockDim.x < n) {
        ISONET_FAST_COUNT(partials_read, sizeof(A));
        sums[u] += *at(i + u * blockDim.x);
      }
  }
  return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

// One block per channel adds that channel's partial sums and rounds once; one more block does so for the scale.
template <typename A>
__global__ void __launch_bounds__(kThreads)
    finish_kernel(Partials<A> partials, Partition p, Gradient grad_bias, Gradient grad_scale) {
  ISONET_FAST_SHARED(A, shared);
  A sum = A(0);
  ISONET_FAST_AWAIT_GRID();
  if (blockIdx.x < p.channels) {
    // With repeats (see partition.h) the channel occurs several times in a row of columns.
    const int64_t width = p.tile_width, channel = blockIdx.x;
    for (int64_t k = 0; k < p.repeats; ++k) {
      const int64_t start = (k * p.channels + channel) * p.inner;
      const int64_t first = start / width, last = (start + p.inner - 1) / width;
      const int64_t stop = last < p.tiles ? last : p.tiles - 1, tiles = stop - first + 1;
      sum += strided_sum<A>(tiles * p.splits, [&](int64_t i) {
        const int64_t place = p.by_splits(i), split = i - place * p.splits, tile = first + place;
        return partials.bias + (split * p.tiles + tile) * p.slots + k * p.channels + channel - p.by_inner(tile * width);
      });
    }
  } else {
    sum = strided_sum<A>(p.blocks(), [&](int64_t i) { return partials.scale + i; });
  }
  sum = block_sum(sum, shared);
  if (threadIdx.x == 0) {
    if (blockIdx.x < p.channels)
      write_gradient(grad_bias, blockIdx.x, sum);
    else
      write_gradient(grad_scale, 0, sum);
  }
}

}  // namespace isonet_fast
