// From a call (dtype, extent, pointers) to kernels on a stream: choose the element type, the vector width and the
// kernel; launch; check. Nothing here waits for the GPU or allocates, so a call can be captured in a CUDA graph.
#pragma once

#include <cuda_runtime_api.h>

#include <array>
#include <atomic>

#include "call.h"
#include "elementwise.cuh"

namespace isonet_fast::cuda {

template <class Formula>
Partition partition_of(const Call& call) {
  bool aligned = true;
  for (int k = 0; k < Formula::kReads; ++k) aligned = aligned && reinterpret_cast<uintptr_t>(call.in[k]) % 16 == 0;
  for (int k = 0; k < Formula::kWrites; ++k) aligned = aligned && reinterpret_cast<uintptr_t>(call.out[k]) % 16 == 0;
  const int vector = aligned ? static_cast<int>(16 / size_of(call.dtype)) : 1;
  return make_partition(call.extent, vector, Formula::kSumsBias);
}

inline int64_t size_of_sum(DType dtype) { return dtype == DType::float64 ? 8 : 4; }

template <class Formula>
int64_t workspace_bytes(const Call& call) {
  if (call.extent.numel() == 0) return 0;
  const Partition p = partition_of<Formula>(call);
  return (p.blocks() * p.slots + (Formula::kSumsScale ? p.blocks() : 0)) * size_of_sum(call.dtype);
}

template <typename T, int V, class Formula>
cudaError_t launch_kernel(const Operands<T>& operands, const Partition& p,
                          const Partials<typename Element<T>::Sum>& partials, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(p.blocks())), block(p.threads);
  const size_t shared = Formula::kSumsBias ? p.shared_values() * sizeof(typename Element<T>::Sum) : 0;
  if (p.planes)
    ISONET_FAST_LAUNCH((planes_kernel<T, V, Formula>), grid, block, shared, stream, operands, p, partials);
  else
    ISONET_FAST_LAUNCH((columns_kernel<T, V, Formula>), grid, block, shared, stream, operands, p, partials);
  return cudaGetLastError();
}

#ifndef ISONET_FAST_EMULATED
// Whether the code that this device runs waits where the source says so. Code made for sm_90 or later does; PTX for an
// earlier chip does not, on whatever chip it is compiled. (A driver before CUDA 12.4 can't capture such launches.)
template <class Kernel>
bool awaits_grid(Kernel kernel) {
  static std::array<std::atomic<int>, 128> known{};  // 0: not asked yet
  int device = 0, driver = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return false;
  std::atomic<int>& answer = known.at(device);
  if (answer == 0) {
    cudaFuncAttributes attributes{};
    const bool asked = cudaFuncGetAttributes(&attributes, kernel) == cudaSuccess &&
                       cudaDriverGetVersion(&driver) == cudaSuccess;
    answer = asked && attributes.ptxVersion >= 90 && driver >= 12040 ? 1 : 2;
  }
  return answer == 1;
}

// Launches a kernel while the one before it on the stream still runs, if it awaits that one: 2 microseconds less.
template <class... Parameters, class... Arguments>
cudaError_t launch_after(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared, cudaStream_t stream,
                         Arguments... arguments) {
  cudaLaunchAttribute early{};
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared;
  config.stream = stream;
  config.attrs = &early;
  config.numAttrs = awaits_grid(kernel) ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...);
}
#endif

template <typename T, class Formula>
cudaError_t launch_typed(const Call& call, void* workspace, cudaStream_t stream) {
  using A = typename Element<T>::Sum;
  Partition p{};  // no element: no blocks, and the gradients of the parameters are sums over nothing
  p.channels = call.extent.channels;
  Partials<A> partials{static_cast<A*>(workspace), nullptr};
  if (call.extent.numel() > 0) {
    p = partition_of<Formula>(call);
    if (p.blocks() > 0x7fffffff) return cudaErrorInvalidConfiguration;
    partials.scale = partials.bias + p.blocks() * p.slots;
    Operands<T> operands{};
    for (int k = 0; k < Formula::kReads; ++k) operands.in[k] = static_cast<const T*>(call.in[k]);
    for (int k = 0; k < Formula::kWrites; ++k) operands.out[k] = static_cast<T*>(call.out[k]);
    operands.bias = call.bias;
    operands.scale = call.scale;
    const cudaError_t error = p.vector == 1 ? launch_kernel<T, 1, Formula>(operands, p, partials, stream)
                                            : launch_kernel<T, 16 / sizeof(T), Formula>(operands, p, partials, stream);
    if (error != cudaSuccess) return error;
  }
  if constexpr (Formula::kSumsBias) {
    const int64_t blocks = p.channels + (Formula::kSumsScale ? 1 : 0);
    if (blocks > 0x7fffffff) return cudaErrorInvalidConfiguration;
    if (blocks > 0) {
      const dim3 grid(static_cast<unsigned>(blocks)), block(p.finish_threads(Formula::kSumsScale));
      return launch_after(finish_kernel<A>, grid, block, 32 * sizeof(A), stream, partials, p,
                          Gradient{call.grad_bias, call.bias.dtype}, Gradient{call.grad_scale, call.scale.dtype});
    }
  }
  return cudaSuccess;
}

template <class Formula>
cudaError_t launch(const Call& call, void* workspace, cudaStream_t stream) {
  switch (call.dtype) {
    case DType::float32: return launch_typed<float, Formula>(call, workspace, stream);
    case DType::float64: return launch_typed<double, Formula>(call, workspace, stream);
    case DType::float16: return launch_typed<__half, Formula>(call, workspace, stream);
    case DType::bfloat16: return launch_typed<__nv_bfloat16, Formula>(call, workspace, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace isonet_fast::cuda
