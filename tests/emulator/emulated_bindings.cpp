// csrc/bindings.cpp, unmodified, with every CPU tensor taken for one on a GPU: at the CPU key the ops then go the way
// to the CUDA launchers, whose kernels cuda_on_cpu.h runs. What follows stands in for the GPU's runtime.
#include "cuda_on_cpu.h"

// All of torch before the macros below; bindings.cpp includes it again, to no effect.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

namespace torch::stable::accelerator {
struct EmulatedDeviceGuard {
  static inline int alive = 0;
  explicit EmulatedDeviceGuard(int32_t) { ++alive; }
  ~EmulatedDeviceGuard() { --alive; }
};
}  // namespace torch::stable::accelerator

#define DeviceGuard EmulatedDeviceGuard
#define is_cuda is_cpu
#define aoti_torch_device_type_cuda aoti_torch_device_type_cpu
#include "bindings.cpp"

extern "C" {

// The default stream; but a launch without a guard would go to the wrong GPU where there are two.
AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
  *stream = nullptr;
  return torch::stable::accelerator::EmulatedDeviceGuard::alive == 1 ? AOTI_TORCH_SUCCESS : AOTI_TORCH_FAILURE;
}

const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaErrorNoKernelImageForDevice ? "no kernel image is available" : "a launcher of the emulator refused";
}

[[gnu::visibility("default")]] int emulated_launches() { return emulator::launches; }

}  // extern "C"

// The CPU kernels are not part of this library, so that no result can be theirs.
namespace isonet_fast::cpu {
[[noreturn]] void not_here() { throw std::logic_error("a CPU kernel was called, not the emulated one"); }
template <class Formula>
void launch(const Call&) {
  not_here();
}
void orthogonality(const std::vector<OrthogonalityLayer>&, bool, double*) { not_here(); }
}  // namespace isonet_fast::cpu
