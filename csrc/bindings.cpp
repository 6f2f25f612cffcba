// From the ops' tensors to the launchers; no kernels. The schemas, fakes and autograd are Python's (isonet_fast/ops/).
//
// Built on the LibTorch stable ABI, so one library serves every Python and every torch from 2.11 on, with or
// without CUDA: on a CPU-only torch the one CUDA symbol needed here, declared weak, is simply null.
// The same function implements an op at both keys.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cstdlib>
#include <optional>
#include <tuple>
#include <vector>

#include "orthogonality.h"
#include "residual_srelu.h"
#include "srelu.h"
#include "torch_launch.h"
#include "torch_tensor.h"

namespace isonet_fast {
namespace {

// y may be x itself. Both dense, in one memory order.
void srelu_into(const Tensor& x, const Tensor& bias, const Tensor& y) {
  launch<SReLUForward>(x, {.dtype = dtype_of(x, "x"),
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
  launch<SReLUBackward>(y, {.dtype = dtype_of(y, "output"),
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
  launch<ResidualSReLUForward>(branch, {.dtype = dtype_of(branch, "branch"),
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
  launch<ResidualSReLUBackward>(
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

// The next layer of the plan: groups, transposed, frequency, kernel (3), phases (3), number of units, then 3 numbers per
// unit; and its waves.
OrthogonalityLayer read_layer(const Tensor& weight, const int64_t*& at, const int64_t* end, const float*& waves,
                              const float* waves_end) {
  STD_TORCH_CHECK(weight.scalar_type() == ScalarType::Float && weight.is_cpu(), "weights must be float32 on the CPU");
  STD_TORCH_CHECK(end - at >= 10 && at[9] >= 0 && (end - at - 10) / 3 >= at[9], "plan must describe every weight");
  OrthogonalityLayer layer{};
  layer.dims = weight.dim();
  layer.sizes = weight.sizes().data();
  layer.weight = static_cast<const float*>(weight.const_data_ptr());
  layer.weight_strides = weight.strides().data();
  layer.groups = at[0];
  layer.transposed = at[1] != 0;
  layer.frequency = at[2] != 0;
  std::copy(at + 3, at + 6, layer.kernel);
  std::copy(at + 6, at + 9, layer.phases);
  layer.one_tap = layer.kernel[0] * layer.kernel[1] * layer.kernel[2] == 1;
  layer.count = at[9];
  layer.units = at + 10;
  layer.waves = waves;
  STD_TORCH_CHECK(layer.dims >= 2 && layer.dims <= 5 && layer.groups > 0 && layer.sizes[0] % layer.groups == 0,
                  "weights must be (groups * rows, columns, k...)");
  int64_t blocks = 1;
  for (int64_t d = 0; d < 3; ++d) {
    STD_TORCH_CHECK(layer.one_tap || layer.kernel[d] == (d + layer.dims < 5 ? 1 : layer.sizes[d + layer.dims - 3]),
                    "plan must hold the kernel of every weight");
    STD_TORCH_CHECK(layer.phases[d] > 0, "phases must be positive");
    STD_TORCH_CHECK(layer.frequency || layer.phases[d] == 1, "phases must be 1 for offsets");
    blocks *= (layer.kernel[d] + layer.phases[d] - 1) / layer.phases[d];
  }
  for (int64_t n = 0; n < 3 * layer.count && !layer.frequency; ++n)
    STD_TORCH_CHECK(std::abs(layer.units[n]) < layer.kernel[n % 3], "offsets must be smaller than the kernel");
  if (layer.frequency) {
    STD_TORCH_CHECK((waves_end - waves) / std::max<int64_t>(blocks, 1) >= layer.count, "waves must hold every frequency");
    waves += layer.count * blocks;
  }
  at = layer.units + 3 * layer.count;
  return layer;
}

Tensor orthogonality_small_(std::vector<Tensor> weights, std::vector<Tensor> grads, Tensor plan, Tensor waves,
                            std::vector<double> scale, bool add) {
  STD_TORCH_CHECK(grads.empty() || grads.size() == weights.size(), "grads must be as many as weights, or none");
  STD_TORCH_CHECK(scale.size() == weights.size(), "scale must be as many as weights");
  STD_TORCH_CHECK(plan.scalar_type() == ScalarType::Long && plan.is_contiguous() && plan.is_cpu(),
                  "plan must be contiguous int64 on the CPU");
  const auto* at = static_cast<const int64_t*>(plan.const_data_ptr());
  const int64_t* const end = at + plan.numel();
  STD_TORCH_CHECK(waves.scalar_type() == ScalarType::Float && waves.is_contiguous() && waves.is_cpu(),
                  "waves must be contiguous float32 on the CPU");
  const auto* wave = static_cast<const float*>(waves.const_data_ptr());
  const float* const waves_end = wave + waves.numel();
  std::vector<OrthogonalityLayer> layers;
  for (size_t n = 0; n < weights.size(); ++n) {
    layers.push_back(read_layer(weights[n], at, end, wave, waves_end));
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
  cpu::orthogonality(layers, add, static_cast<double*>(losses.mutable_data_ptr()));
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

}  // namespace isonet_fast
