// How a tensor is cut into blocks of threads: arithmetic on its shape, done on the host.
//
// It depends only on the shape and the alignment, never on the GPU: the order of the additions, and so the
// bits of the result, are the same everywhere.
//
// Repeats: if a row of channels * inner elements is not a whole number of vectors, several rows are taken as
// one (bfloat16, 20 channels: two rows of 20 are five vectors of 8). So odd sizes keep 16-byte accesses.
#pragma once

#include "tensor.h"

#ifdef __CUDACC__
#define ISONET_FAST_BOTH __host__ __device__
#else
#define ISONET_FAST_BOTH
#endif

namespace isonet_fast {

constexpr int kThreads = 256;
constexpr int kFullGrid = 4 * 132;  // the blocks that an H100 or H200 runs at once; on every GPU, as all else here

// n / divisor for 0 <= n < 2^63 as one multiplication and a shift (Granlund and Montgomery, 1994).
struct Divide {
  uint64_t multiplier = uint64_t(1) << 63;
  int shift = 0;

  Divide() = default;
  explicit Divide(int64_t divisor) {  // 1 <= divisor <= 2^62
    while ((int64_t(1) << shift) < divisor) ++shift;
    const auto power = static_cast<unsigned __int128>(1) << (63 + shift);
    multiplier = static_cast<uint64_t>((power + divisor - 1) / divisor);
  }
#if defined(__CUDACC__) || defined(ISONET_FAST_EMULATED)
  __device__ __forceinline__ int64_t operator()(int64_t n) const {
    return static_cast<int64_t>(__umul64hi(static_cast<uint64_t>(n) << 1, multiplier) >> shift);
  }
#endif
};

struct Partition {
  bool planes;          // planes_kernel, else columns_kernel
  int vector;           // elements per access: 16 bytes' worth, or 1 where a pointer is misaligned
  int64_t channels;
  int64_t inner;        // consecutive elements of one channel
  int64_t repeats;      // rows taken as one
  int64_t plane;        // planes: vectors in a plane
  int64_t columns;      // columns: vectors in a row
  int64_t length;       // planes: vectors of one channel; columns: rows
  int64_t span;         // how much of `length` one block takes
  int64_t splits;       // ceil(length / span)
  int64_t tiles;        // planes: channels; columns: tiles of columns. Block = split * tiles + tile
  int64_t tile_width;   // elements in a tile's row
  int tile_columns;     // columns: the block is tile_rows x tile_columns threads
  int tile_rows;
  int threads;
  int slots;            // channels that one tile can touch
  int64_t vectors;      // whole vectors in the tensor
  int tail;             // elements after them, and where the vector holding them would be
  int64_t tail_row, tail_column;
  Divide by_plane, by_inner, by_channels, by_tiles, by_splits;

  ISONET_FAST_BOTH int64_t blocks() const { return splits * tiles; }
  // One thread per value that a block of finish_kernel adds, in whole warps.
  int finish_threads(bool sums_scale) const {
    int64_t values = splits == 0 ? 0 : splits * repeats * ((inner - 1) / tile_width + 2);
    if (sums_scale && blocks() > values) values = blocks();
    return values < 32 ? 32 : values > kThreads ? kThreads : static_cast<int>((values + 31) / 32 * 32);
  }
  int shared_values() const { return planes ? 32 : 32 + tile_rows * tile_columns * vector; }
};

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t clamp(int64_t x, int64_t low, int64_t high) { return x > high ? high : x < low ? low : x; }

inline int64_t gcd(int64_t a, int64_t b) { return b == 0 ? a : gcd(b, a % b); }

// `extent` holds at least one element. With sums, a block must be long enough to be worth its partial row and
// the rows few enough to be added by one small kernel: at most about 2,048 blocks of at least 4 vectors per thread.
// Without sums, 8 vectors per thread are two or four rounds of loads; 4 if 8 leave multiprocessors without a block.
inline Partition make_partition(const Extent& extent, int vector, bool sums) {
  Partition p{};
  p.vector = vector;
  p.channels = extent.channels;
  p.inner = extent.inner;
  const int64_t numel = extent.numel();
  p.vectors = numel / vector;
  p.tail = static_cast<int>(numel % vector);
  const int64_t small = ceil_div(p.vectors + 1, kThreads * 4);
  const int64_t wanted = sums ? clamp(ceil_div(p.vectors, kThreads * 4), 1, 2048)
                              : clamp(ceil_div(p.vectors + 1, kThreads * 8), small < kFullGrid ? small : kFullGrid, small);

  // Runs of at least 512 bytes, one warp's access, for planes_kernel.
  p.planes = extent.inner % vector == 0 && extent.inner / vector >= 32;
  if (p.planes) {
    p.repeats = 1;
    p.plane = extent.inner / vector;
    p.length = extent.outer * p.plane;
    p.tiles = extent.channels;
    p.tile_width = extent.inner;
    p.slots = 1;
    p.threads = kThreads;
    const int64_t splits = clamp(ceil_div(wanted, p.tiles), 1, ceil_div(p.length, kThreads));
    p.span = ceil_div(ceil_div(p.length, splits), kThreads) * kThreads;
  } else {
    const int64_t row = extent.channels * extent.inner;
    p.plane = 1;
    p.repeats = vector / gcd(row, vector);
    p.columns = row * p.repeats / vector;
    p.length = ceil_div(extent.outer, p.repeats);
    if (p.length == 1) p.columns = ceil_div(numel, vector);
    // Tiles 32 vectors (512 bytes) wide and 8 rows of threads high keep the partial rows few; with fewer rows
    // the tile is wider instead, so that no thread is idle.
    int64_t width = kThreads / 8;
    while (width < kThreads && kThreads / width > p.length) width *= 2;
    p.tiles = ceil_div(p.columns, width);
    p.tile_columns = static_cast<int>(ceil_div(p.columns, p.tiles));
    p.tile_rows = static_cast<int>(clamp(p.length, 1, kThreads / p.tile_columns));
    p.threads = static_cast<int>(ceil_div(p.tile_columns * p.tile_rows, 32) * 32);
    p.tile_width = static_cast<int64_t>(p.tile_columns) * vector;
    p.slots = static_cast<int>((p.tile_width + extent.inner - 2) / extent.inner + 1);
    p.tail_row = p.vectors / p.columns;
    p.tail_column = p.vectors % p.columns;
    const int64_t splits = clamp(ceil_div(wanted, p.tiles), 1, ceil_div(p.length, p.tile_rows));
    p.span = ceil_div(ceil_div(p.length, splits), p.tile_rows) * p.tile_rows;
  }
  p.splits = ceil_div(p.length, p.span);
  p.by_plane = Divide(p.plane);
  p.by_inner = Divide(p.inner);
  p.by_channels = Divide(p.channels);
  p.by_tiles = Divide(p.tiles);
  p.by_splits = Divide(p.splits);
  return p;
}

}  // namespace isonet_fast
