// From the ops' tensors to the launchers; no kernels. The schemas, fakes and autograd are Python's (isonet_fast/ops/).
//
// Built on the LibTorch stable ABI, so one library serves every Python and every torch from 2.11 on, with or
// without CUDA: on a CPU-only torch the one CUDA symbol needed here, declared weak, is simply null.
// The same function implements an op at both keys.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <array>
#include <cstdlib>
#include <mutex>
#include <optional>
#include <tuple>
#include <vector>

#include "call.h"
#include "orthogonality.h"
#include "residual_srelu.cuh"
#include "srelu.cuh"

#ifdef ISONET_FAST_CUDA
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);
#endif

namespace {

using isonet_fast::Call;
using isonet_fast::DType;
using isonet_fast::Extent;
using isonet_fast::Parameter;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

DType dtype_of(const Tensor& tensor, const char* name) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return DType::float32;
    case ScalarType::Double: return DType::float64;
    case ScalarType::Half: return DType::float16;
    case ScalarType::BFloat16: return DType::bfloat16;
    default: STD_TORCH_CHECK(false, name, " must be float32, float64, float16 or bfloat16");
  }
}

// The three numbers of tensor.h, or nothing if the tensor has gaps or overlaps.
std::optional<Extent> extent_of(const Tensor& x) {
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
Tensor empty_as(const Tensor& x) {
  int32_t dtype, device_type;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(x.get(), &dtype));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(x.get(), &device_type));
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(x.dim(), x.sizes().data(), x.strides().data(), dtype, device_type,
                                                  x.get_device_index(), &handle));
  return Tensor(handle);
}

// A parameter without gaps, of any shape.
Tensor packed(const Tensor& parameter) {
  return parameter.is_contiguous() ? parameter : torch::stable::contiguous(parameter);
}

// x itself, or a copy without gaps: empty_like keeps the order of the dimensions, as the fakes in Python do.
Tensor dense(const Tensor& x) {
  if (extent_of(x)) return x;
  Tensor copy = torch::stable::empty_like(x);
  torch::stable::copy_(copy, x);
  return copy;
}

bool same_layout(const Tensor& a, const Tensor& b) {
  for (int64_t d = 0; d < a.dim(); ++d)
    if (a.size(d) != 1 && a.stride(d) != b.stride(d)) return false;
  return true;
}

// `source` in the memory order of `like`: under channels_last a gradient can arrive as NCHW or expanded.
Tensor relaid(const Tensor& source, const Tensor& like) {
  if (same_layout(source, like)) return source;
  Tensor copy = empty_as(like);
  torch::stable::copy_(copy, source);
  return copy;
}

void check_same(const Tensor& tensor, const Tensor& x, const char* name) {
  STD_TORCH_CHECK(tensor.sizes().equals(x.sizes()), name, " must have the shape of the other tensors");
  STD_TORCH_CHECK(tensor.scalar_type() == x.scalar_type(), name, " must have the dtype of the other tensors");
  STD_TORCH_CHECK(tensor.device() == x.device(), name, " must be on the device of the other tensors");
}

void check_parameter(const Tensor& parameter, const Tensor& x, const char* name) {
  STD_TORCH_CHECK(parameter.scalar_type() == x.scalar_type() || parameter.scalar_type() == ScalarType::Float, name,
                  " must have the dtype of the input or be float32");
  STD_TORCH_CHECK(parameter.device() == x.device(), name, " must be on the device of the input");
}

void check_bias(const Tensor& x, const Tensor& bias) {
  STD_TORCH_CHECK(x.dim() >= 2, "the input must be (N, C, ...), but it has ", x.dim(), " dimensions");
  STD_TORCH_CHECK(bias.numel() == x.size(1), "bias must have one value per channel, C = ", x.size(1));
  check_parameter(bias, x, "bias");
}

void check_scale(const Tensor& x, const Tensor& scale) {
  STD_TORCH_CHECK(scale.numel() == 1, "scale must have one element, but it has ", scale.numel());
  check_parameter(scale, x, "scale");
}

Parameter parameter(const Tensor& tensor) { return {tensor.const_data_ptr(), dtype_of(tensor, "a parameter")}; }

#ifdef ISONET_FAST_CUDA
cudaStream_t current_stream(const Tensor& x) {
  STD_TORCH_CHECK(&aoti_torch_get_current_cuda_stream != nullptr, "this torch was built without CUDA");
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

void check_launch(cudaError_t error) {
  STD_TORCH_CHECK(error == cudaSuccess, "isonet_fast: CUDA error: ", cudaGetErrorString(error));
}

Tensor workspace(const Tensor& x, int64_t bytes) {
  int32_t device_type;
  const int64_t step = 1;
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(x.get(), &device_type));
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(1, &bytes, &step, aoti_torch_dtype_uint8(), device_type,
                                                  x.get_device_index(), &handle));
  return Tensor(handle);
}
#endif

#ifdef ISONET_FAST_CUDA
// What became of the first launch on each device. A driver older than the toolkit that built this library, or a chip
// that it holds no code for, refuses every launch: there the op's PyTorch implementation serves (ops/_library.py).
struct FirstLaunch {
  std::once_flag made;
  cudaError_t error = cudaSuccess;
};
std::array<FirstLaunch, 128> first_launches;  // PyTorch knows at most 120 devices

void launch_first(FirstLaunch& first, int32_t device_type, int32_t device) {
  const int64_t size = 8, step = 1;  // four values and their four biases, whatever they are
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(1, &size, &step, aoti_torch_dtype_float32(), device_type, device, &handle));
  const Tensor memory(handle);
  const torch::stable::accelerator::DeviceGuard guard(device);
  auto* const x = static_cast<float*>(memory.mutable_data_ptr());
  const Call call{
      .dtype = DType::float32, .extent = {1, 4, 1}, .in = {x}, .out = {x}, .bias = {x + 4, DType::float32}};
  first.error = isonet_fast::cuda::launch<isonet_fast::SReLUForward>(call, nullptr, current_stream(memory));
  if (first.error == cudaErrorMemoryAllocation) check_launch(first.error);  // says nothing of the next time
}

bool kernels_run_on(AtenTensorHandle x) {
  int32_t device_type, device;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(x, &device_type));
  if (device_type != aoti_torch_device_type_cuda()) return true;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(x, &device));
  FirstLaunch& first = first_launches.at(std::max(device, 0));
  std::call_once(first.made, [&] { launch_first(first, device_type, device); });
  return first.error == cudaSuccess;
}

// An op as the dispatcher calls it: by its kernels where they run, else by the op of its name in PyTorch. Its first
// argument is a tensor.
template <void (*kernels)(StableIValue*, uint64_t, uint64_t), const char* const& in_pytorch>
void served(StableIValue* stack, uint64_t inputs, uint64_t outputs) {
  if (kernels_run_on(torch::stable::detail::to<AtenTensorHandle>(stack[0]))) return kernels(stack, inputs, outputs);
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(in_pytorch, "", stack, TORCH_ABI_VERSION));
}
#endif

// To the GPU on the current stream, or to the CPU.
template <class Formula>
void launch([[maybe_unused]] const Tensor& x, const Call& call) {
#ifdef ISONET_FAST_CUDA
  if (x.is_cuda()) {
    const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
    std::optional<Tensor> partials;
    if constexpr (Formula::kSumsBias) partials = workspace(x, isonet_fast::cuda::workspace_bytes<Formula>(call));
    void* const memory = partials ? partials->mutable_data_ptr() : nullptr;
    return check_launch(isonet_fast::cuda::launch<Formula>(call, memory, current_stream(x)));
  }
#endif
  isonet_fast::cpu::launch<Formula>(call);
}

// y may be x itself. Both dense, in one memory order.
void srelu_into(const Tensor& x, const Tensor& bias, const Tensor& y) {
  launch<isonet_fast::SReLUForward>(x, {.dtype = dtype_of(x, "x"),
                                        .extent = *extent_of(x),
                                        .in = {x.const_data_ptr()},
                                        .out = {y.mutable_data_ptr()},
                                        .bias = parameter(bias)});
}

Tensor srelu(Tensor x, Tensor bias) {
  check_bias(x, bias);
  x = dense(x);
  Tensor y = empty_as(x);
  srelu_into(x, packed(bias), y);
  return y;
}

void srelu_(Tensor x, Tensor bias) {
  check_bias(x, bias);
  const Tensor y = dense(x);
  srelu_into(y, packed(bias), y);
  if (y.data_ptr() != x.data_ptr()) torch::stable::copy_(x, y);
}

std::tuple<Tensor, Tensor> srelu_backward(Tensor grad_output, Tensor output, Tensor bias) {
  check_bias(output, bias);
  check_same(grad_output, output, "grad_output");
  const Tensor y = dense(output), g = relaid(grad_output, y), b = packed(bias);
  Tensor grad_x = empty_as(y), grad_bias = empty_as(b);
  launch<isonet_fast::SReLUBackward>(y, {.dtype = dtype_of(y, "output"),
                                         .extent = *extent_of(y),
                                         .in = {g.const_data_ptr(), y.const_data_ptr()},
                                         .out = {grad_x.mutable_data_ptr()},
                                         .bias = parameter(b),
                                         .grad_bias = grad_bias.mutable_data_ptr()});
  return {grad_x, grad_bias};
}

// y may be the branch itself. All three dense, in one memory order.
void residual_srelu_into(const Tensor& shortcut, const Tensor& branch, const Tensor& bias,
                         const std::optional<Tensor>& scale, const Tensor& y) {
  launch<isonet_fast::ResidualSReLUForward>(branch, {.dtype = dtype_of(branch, "branch"),
                                                     .extent = *extent_of(branch),
                                                     .in = {shortcut.const_data_ptr(), branch.const_data_ptr()},
                                                     .out = {y.mutable_data_ptr()},
                                                     .bias = parameter(bias),
                                                     .scale = scale ? parameter(*scale) : Parameter{}});
}

void check_join(const Tensor& shortcut, const Tensor& branch, const Tensor& bias, const std::optional<Tensor>& scale) {
  check_bias(branch, bias);
  check_same(shortcut, branch, "shortcut");
  if (scale) check_scale(branch, *scale);
}

Tensor residual_srelu(Tensor shortcut, Tensor branch, Tensor bias, std::optional<Tensor> scale) {
  check_join(shortcut, branch, bias, scale);
  shortcut = dense(shortcut);
  Tensor y = empty_as(shortcut);
  residual_srelu_into(shortcut, relaid(branch, shortcut), packed(bias), scale, y);
  return y;
}

void residual_srelu_(Tensor shortcut, Tensor branch, Tensor bias, std::optional<Tensor> scale) {
  check_join(shortcut, branch, bias, scale);
  const Tensor y = dense(branch);
  residual_srelu_into(relaid(shortcut, y), y, packed(bias), scale, y);
  if (y.data_ptr() != branch.data_ptr()) torch::stable::copy_(branch, y);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> residual_srelu_backward(Tensor grad_output, Tensor output, Tensor branch,
                                                                   Tensor bias, Tensor scale) {
  check_bias(output, bias);
  check_same(grad_output, output, "grad_output");
  check_same(branch, output, "branch");
  check_scale(output, scale);
  const Tensor y = dense(output), g = relaid(grad_output, y), h = relaid(branch, y);
  const Tensor b = packed(bias);
  Tensor grad_shortcut = empty_as(y), grad_branch = empty_as(y);
  Tensor grad_bias = empty_as(b), grad_scale = empty_as(scale);
  launch<isonet_fast::ResidualSReLUBackward>(
      y, {.dtype = dtype_of(y, "output"),
          .extent = *extent_of(y),
          .in = {g.const_data_ptr(), y.const_data_ptr(), h.const_data_ptr()},
          .out = {grad_shortcut.mutable_data_ptr(), grad_branch.mutable_data_ptr()},
          .bias = parameter(b),
          .scale = parameter(scale),
          .grad_bias = grad_bias.mutable_data_ptr(),
          .grad_scale = grad_scale.mutable_data_ptr()});
  return {grad_shortcut, grad_branch, grad_bias, grad_scale};
}

// The next layer of the plan: groups, transposed, kernel (3), number of offsets, then 3 numbers per offset.
isonet_fast::OrthogonalityLayer read_layer(const Tensor& weight, const int64_t*& at, const int64_t* end) {
  STD_TORCH_CHECK(weight.scalar_type() == ScalarType::Float && weight.is_cpu(), "weights must be float32 on the CPU");
  STD_TORCH_CHECK(end - at >= 6 && at[5] >= 0 && (end - at - 6) / 3 >= at[5], "plan must describe every weight");
  isonet_fast::OrthogonalityLayer layer{};
  layer.dims = weight.dim();
  layer.sizes = weight.sizes().data();
  layer.weight = static_cast<const float*>(weight.const_data_ptr());
  layer.weight_strides = weight.strides().data();
  layer.groups = at[0];
  layer.transposed = at[1] != 0;
  std::copy(at + 2, at + 5, layer.kernel);
  layer.one_tap = layer.kernel[0] * layer.kernel[1] * layer.kernel[2] == 1;
  layer.count = at[5];
  layer.offsets = at + 6;
  STD_TORCH_CHECK(layer.dims >= 2 && layer.dims <= 5 && layer.groups > 0 && layer.sizes[0] % layer.groups == 0,
                  "weights must be (groups * rows, columns, k...)");
  for (int64_t d = 0; d < 3 && !layer.one_tap; ++d)
    STD_TORCH_CHECK(layer.kernel[d] == (d + layer.dims < 5 ? 1 : layer.sizes[d + layer.dims - 3]),
                    "plan must hold the kernel of every weight");
  for (int64_t n = 0; n < 3 * layer.count; ++n)
    STD_TORCH_CHECK(std::abs(layer.offsets[n]) < layer.kernel[n % 3], "offsets must be smaller than the kernel");
  at = layer.offsets + 3 * layer.count;
  return layer;
}

Tensor orthogonality_small_(std::vector<Tensor> weights, std::vector<Tensor> grads, Tensor plan,
                            std::vector<double> scale, bool add) {
  STD_TORCH_CHECK(grads.empty() || grads.size() == weights.size(), "grads must be as many as weights, or none");
  STD_TORCH_CHECK(scale.size() == weights.size(), "scale must be as many as weights");
  STD_TORCH_CHECK(plan.scalar_type() == ScalarType::Long && plan.is_contiguous() && plan.is_cpu(),
                  "plan must be contiguous int64 on the CPU");
  const auto* at = static_cast<const int64_t*>(plan.const_data_ptr());
  const int64_t* const end = at + plan.numel();
  std::vector<isonet_fast::OrthogonalityLayer> layers;
  for (size_t n = 0; n < weights.size(); ++n) {
    layers.push_back(read_layer(weights[n], at, end));
    layers[n].scale = static_cast<float>(scale[n]);
    if (grads.empty()) continue;
    check_same(grads[n], weights[n], "grads");
    for (int64_t d = 0; d < grads[n].dim(); ++d)
      STD_TORCH_CHECK(grads[n].stride(d) != 0 || grads[n].size(d) <= 1 || grads[n].numel() == 0,
                      "elements of grads must not share memory");
    layers[n].grad = static_cast<float*>(grads[n].mutable_data_ptr());
    layers[n].grad_strides = grads[n].strides().data();
  }
  const int64_t count = weights.size(), step = 1;
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(1, &count, &step, aoti_torch_dtype_float64(),
                                                  aoti_torch_device_type_cpu(), 0, &handle));
  Tensor losses(handle);
  isonet_fast::cpu::orthogonality(layers, add, static_cast<double*>(losses.mutable_data_ptr()));
  return losses;
}

}  // namespace

#ifdef ISONET_FAST_CUDA
#define ISONET_FAST_SERVED(m, op)                                          \
  static constexpr const char* op##_in_pytorch = "isonet_fast_pytorch::" #op; \
  m.impl(#op, &served<TORCH_BOX(&op), op##_in_pytorch>)
#else
#define ISONET_FAST_SERVED(m, op) m.impl(#op, TORCH_BOX(&op))
#endif
#define ISONET_FAST_IMPLEMENT(m)         \
  ISONET_FAST_SERVED(m, srelu);          \
  ISONET_FAST_SERVED(m, srelu_);         \
  ISONET_FAST_SERVED(m, srelu_backward); \
  ISONET_FAST_SERVED(m, residual_srelu); \
  ISONET_FAST_SERVED(m, residual_srelu_); \
  ISONET_FAST_SERVED(m, residual_srelu_backward)

STABLE_TORCH_LIBRARY_IMPL(isonet_fast, CPU, m) {
  ISONET_FAST_IMPLEMENT(m);
  m.impl("orthogonality_small_", TORCH_BOX(&orthogonality_small_));
}
#ifdef ISONET_FAST_CUDA
STABLE_TORCH_LIBRARY_IMPL(isonet_fast, CUDA, m) { ISONET_FAST_IMPLEMENT(m); }

// Why the kernels do not run on a device; null if they do, or if none was launched there.
extern "C" __attribute__((visibility("default"))) const char* isonet_fast_refusal(int32_t device) {
  const cudaError_t error = first_launches.at(device).error;
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}
#endif
