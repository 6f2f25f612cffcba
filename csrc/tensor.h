// What the elementwise kernels need to know of a tensor: its element type, and its shape as three numbers.
//
// Every dense tensor of shape (N, C, *), in whatever order its dimensions lie in memory, is one block of
// numel elements in which element i belongs to channel (i / inner) % channels. NCHW has inner = H * W,
// channels_last has inner = 1, a permuted tensor something in between. So three numbers serve all layouts,
// and nothing below this line knows what a stride is.
#pragma once

#include <cstdint>

namespace isonet_fast {

enum class DType : int { float32, float64, float16, bfloat16 };

inline int64_t size_of(DType dtype) {
  return dtype == DType::float64 ? 8 : dtype == DType::float32 ? 4 : 2;
}

struct Extent {
  int64_t outer;     // number of times that the run over all channels repeats
  int64_t channels;
  int64_t inner;     // consecutive elements of one channel

  int64_t numel() const { return outer * channels * inner; }
};

// A bias (one value per channel) or a scale (one value): in the tensor's dtype, or a float32 master.
struct Parameter {
  const void* data;
  DType dtype;
};

}  // namespace isonet_fast
