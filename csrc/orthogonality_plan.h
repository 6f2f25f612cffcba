// Where the elements of a small layer's groups lie: in its tensors, and packed in cache.
//
// A matrix A (rows x columns) is packed as its transpose, columns x rows, with the rows filled up with zeros to eight
// floats. In the overlap form a block is one tap, and blocks lie one below the other. In the frequency form a block is
// B_q: the taps r q + p of all phases p (r: how many phases there are) side by side as columns. Where r q + p is no tap
// it holds zeros.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "orthogonality.h"
#include "orthogonality_products.h"

namespace isonet_fast::cpu {

// Where the elements of some dimensions lie, the last dimension fastest.
inline std::vector<int64_t> memory_offsets(const int64_t* sizes, const int64_t* strides, int64_t dims) {
  std::vector<int64_t> result{0};
  for (int64_t d = 0; d < dims; ++d) {
    std::vector<int64_t> outer;
    outer.swap(result);
    for (const int64_t place : outer)
      for (int64_t i = 0; i < sizes[d]; ++i) result.push_back(place + i * strides[d]);
  }
  return result;
}

// Where the elements of a tensor (O, I/groups, k...) lie: the sum of the offsets of its group, row, column and tap.
struct MemoryOffsets {
  std::vector<int64_t> rows, columns, taps;
  int64_t group;

  MemoryOffsets(const OrthogonalityLayer& layer, const int64_t* strides) {
    const int64_t outputs = layer.sizes[0] / layer.groups, split = layer.one_tap ? layer.dims : 2;
    rows = memory_offsets(&outputs, strides, 1);
    columns = memory_offsets(layer.sizes + 1, strides + 1, split - 1);
    taps = memory_offsets(layer.sizes + split, strides + split, layer.dims - split);
    if (layer.transposed) rows.swap(columns);
    group = outputs * strides[0];
  }
};

inline bool is_zero(const int64_t* unit) { return unit[0] == 0 && unit[1] == 0 && unit[2] == 0; }

// What the groups of a layer share.
struct Plan {
  const OrthogonalityLayer& layer;
  const MemoryOffsets weight, grad;
  const int64_t rows;
  const int64_t stride;          // the rows, filled up to whole vectors
  int64_t blocks = 1;            // how many there are
  int64_t columns;               // of a block
  int64_t length;                // of a block in floats
  int64_t size;                  // from block to block; no multiple of a page, whose lines would share places in cache
  std::vector<int64_t> taps;     // where each tap is packed

  explicit Plan(const OrthogonalityLayer& layer)
      : layer(layer),
        weight(layer, layer.weight_strides),
        grad(layer, layer.grad == nullptr ? layer.weight_strides : layer.grad_strides),
        rows(weight.rows.size()),
        stride((rows + kPadding - 1) / kPadding * kPadding) {
    int64_t phases = 1, periods[3];
    for (int d = 0; d < 3; ++d) {
      phases *= layer.phases[d];
      periods[d] = (layer.kernel[d] + layer.phases[d] - 1) / layer.phases[d];
      blocks *= periods[d];
    }
    const int64_t tap = weight.columns.size() * stride;
    columns = phases * weight.columns.size();
    length = layer.frequency ? (phases * tap + kBlock - 1) / kBlock * kBlock : tap;
    size = layer.frequency && length % 1024 == 0 ? length + kBlock : length;
    const auto& [height, depth, width] = layer.kernel;
    for (int64_t i = 0; i < height; ++i)
      for (int64_t j = 0; j < depth; ++j)
        for (int64_t k = 0; k < width; ++k) {
          const int64_t at[3] = {i, j, k};
          int64_t block = 0, phase = 0;
          for (int d = 0; d < 3; ++d) {
            block = block * periods[d] + at[d] / layer.phases[d];
            phase = phase * layer.phases[d] + at[d] % layer.phases[d];
          }
          taps.push_back(block * size + phase * tap);
        }
  }

  // With few rows few errors average out, and the work is small: residuals are summed in float64.
  bool thin() const { return rows <= kPadding; }
  int64_t packed() const { return blocks * size; }
  int64_t square() const { return stride * stride; }
};

}  // namespace isonet_fast::cpu
