// Tensors of torch as the kernels need them: checked, dense, in one memory order.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <optional>
#include <utility>
#include <vector>

#include "tensor.h"

namespace isonet_fast {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline DType dtype_of(const Tensor& tensor, const char* name) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return DType::float32;
    case ScalarType::Double: return DType::float64;
    case ScalarType::Half: return DType::float16;
    case ScalarType::BFloat16: return DType::bfloat16;
    default: STD_TORCH_CHECK(false, name, " must be float32, float64, float16 or bfloat16");
  }
}

// The three numbers of tensor.h, or nothing if the tensor has gaps or overlaps.
inline std::optional<Extent> extent_of(const Tensor& x) {
  std::vector<std::pair<int64_t, int64_t>> dims;  // (stride, size); a dimension of size 1 has no stride to speak of
  for (int64_t d = 0; d < x.dim(); ++d)
    if (x.size(d) != 1) dims.emplace_back(x.stride(d), x.size(d));
  const int64_t channels = x.size(1), numel = x.numel();
  if (numel == 0) return Extent{0, channels, 1};
  std::sort(dims.begin(), dims.end());
  int64_t dense = 1;
  for (const auto& [stride, size] : dims) {
    if (stride != dense) return std::nullopt;
    dense *= size;
  }
  if (channels == 1) return Extent{1, 1, numel};
  return Extent{numel / (channels * x.stride(1)), channels, x.stride(1)};
}

// A tensor with the sizes, strides and dtype of a dense x. (torch::stable::empty_like looks its op up by name at every
// call, which takes longer than a small kernel.)
inline Tensor empty_as(const Tensor& x) {
  int32_t dtype, device_type;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(x.get(), &dtype));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(x.get(), &device_type));
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(x.dim(), x.sizes().data(), x.strides().data(), dtype, device_type,
                                                  x.get_device_index(), &handle));
  return Tensor(handle);
}

// A parameter without gaps, of any shape.
inline Tensor packed(const Tensor& parameter) {
  return parameter.is_contiguous() ? parameter : torch::stable::contiguous(parameter);
}

// x itself, or a copy without gaps: empty_like keeps the order of the dimensions, as the fakes in Python do.
inline Tensor dense(const Tensor& x) {
  if (extent_of(x)) return x;
  Tensor copy = torch::stable::empty_like(x);
  torch::stable::copy_(copy, x);
  return copy;
}

inline bool same_layout(const Tensor& a, const Tensor& b) {
  for (int64_t d = 0; d < a.dim(); ++d)
    if (a.size(d) != 1 && a.stride(d) != b.stride(d)) return false;
  return true;
}

// `source` in the memory order of `like`: under channels_last a gradient can arrive as NCHW or expanded.
inline Tensor relaid(const Tensor& source, const Tensor& like) {
  if (same_layout(source, like)) return source;
  Tensor copy = empty_as(like);
  torch::stable::copy_(copy, source);
  return copy;
}

inline void check_same(const Tensor& tensor, const Tensor& x, const char* name) {
  STD_TORCH_CHECK(tensor.sizes().equals(x.sizes()), name, " must have the shape of the other tensors");
  STD_TORCH_CHECK(tensor.scalar_type() == x.scalar_type(), name, " must have the dtype of the other tensors");
  STD_TORCH_CHECK(tensor.device() == x.device(), name, " must be on the device of the other tensors");
}

inline void check_parameter(const Tensor& parameter, const Tensor& x, const char* name) {
  STD_TORCH_CHECK(parameter.scalar_type() == x.scalar_type() || parameter.scalar_type() == ScalarType::Float, name,
                  " must have the dtype of the input or be float32");
  STD_TORCH_CHECK(parameter.device() == x.device(), name, " must be on the device of the input");
}

inline void check_bias(const Tensor& x, const Tensor& bias) {
  STD_TORCH_CHECK(x.dim() >= 2, "the input must be (N, C, ...), but it has ", x.dim(), " dimensions");
  STD_TORCH_CHECK(bias.numel() == x.size(1), "bias must have one value per channel, C = ", x.size(1));
  check_parameter(bias, x, "bias");
}

inline void check_scale(const Tensor& x, const Tensor& scale) {
  STD_TORCH_CHECK(scale.numel() == 1, "scale must have one element, but it has ", scale.numel());
  check_parameter(scale, x, "scale");
}

inline Parameter parameter(const Tensor& tensor) { return {tensor.const_data_ptr(), dtype_of(tensor, "a parameter")}; }

}  // namespace isonet_fast
