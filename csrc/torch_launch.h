// A call sent to the device of its tensors: to a GPU on the current stream if it runs the kernels, or to the CPU.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <array>
#include <mutex>
#include <optional>

#include "call.h"
#include "srelu.h"

#ifdef ISONET_FAST_CUDA
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);
#endif

namespace isonet_fast {

using torch::stable::Tensor;

#ifdef ISONET_FAST_CUDA
inline cudaStream_t current_stream(const Tensor& x) {
  STD_TORCH_CHECK(&aoti_torch_get_current_cuda_stream != nullptr, "this torch was built without CUDA");
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

inline void check_launch(cudaError_t error) {
  STD_TORCH_CHECK(error == cudaSuccess, "isonet_fast: CUDA error: ", cudaGetErrorString(error));
}

inline Tensor workspace(const Tensor& x, int64_t bytes) {
  int32_t device_type;
  const int64_t step = 1;
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(x.get(), &device_type));
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(1, &bytes, &step, aoti_torch_dtype_uint8(), device_type,
                                                  x.get_device_index(), &handle));
  return Tensor(handle);
}

// What became of the first launch on each device. A driver older than the toolkit that built this library, or a chip
// that it holds no code for, refuses every launch: there the op's PyTorch implementation serves (ops/library.py).
struct FirstLaunch {
  std::once_flag made;
  cudaError_t error = cudaSuccess;
};
inline std::array<FirstLaunch, 128> first_launches;  // PyTorch knows at most 120 devices

inline void launch_first(FirstLaunch& first, int32_t device_type, int32_t device) {
  const int64_t size = 8, step = 1;  // four values and their four biases, whatever they are
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(1, &size, &step, aoti_torch_dtype_float32(), device_type, device, &handle));
  const Tensor memory(handle);
  const torch::stable::accelerator::DeviceGuard guard(device);
  auto* const x = static_cast<float*>(memory.mutable_data_ptr());
  const Call call{
      .dtype = DType::float32, .extent = {1, 4, 1}, .in = {x}, .out = {x}, .bias = {x + 4, DType::float32}};
  first.error = cuda::launch<SReLUForward>(call, nullptr, current_stream(memory));
  if (first.error == cudaErrorMemoryAllocation) check_launch(first.error);  // a later launch may succeed
}

inline bool kernels_run_on(AtenTensorHandle x) {
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
    if constexpr (Formula::kSumsBias) partials = workspace(x, cuda::workspace_bytes<Formula>(call));
    void* const memory = partials ? partials->mutable_data_ptr() : nullptr;
    return check_launch(cuda::launch<Formula>(call, memory, current_stream(x)));
  }
#endif
  cpu::launch<Formula>(call);
}

}  // namespace isonet_fast
