// libcuda.so.1 for a machine without a GPU: it accepts what a driver would accept, and launches nothing.
//
// Only what Triton's launchers call. Arguments are checked as the CUDA driver API documents them, so that an illegal
// tensor map or launch fails here as it would there. The device is a Hopper GPU: 132 multiprocessors, 227 KB of shared
// memory per block.
#include <stdint.h>
#include <string.h>

#include "cuda.h"

enum { SHARED = 232448, REGISTERS = 65536, THREADS = 1024, MULTIPROCESSORS = 132 };

long long null_driver_launches = 0, null_driver_tensor_maps = 0;

CUresult cuGetErrorString(CUresult error, const char** text) {
  *text = error == CUDA_SUCCESS ? "no error" : "invalid argument";
  return CUDA_SUCCESS;
}

CUresult cuDriverGetVersion(int* version) {
  *version = CUDA_VERSION;
  return CUDA_SUCCESS;
}

CUresult cuDeviceGet(CUdevice* device, int ordinal) {
  *device = ordinal;
  return ordinal == 0 ? CUDA_SUCCESS : CUDA_ERROR_INVALID_DEVICE;
}

CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute attribute, CUdevice device) {
  switch (attribute) {
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN: *value = SHARED; break;
    case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK: *value = REGISTERS; break;
    case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT: *value = MULTIPROCESSORS; break;
    case CU_DEVICE_ATTRIBUTE_WARP_SIZE: *value = 32; break;
    default: *value = 1;  // clock rates and the like, which nothing here depends on
  }
  return CUDA_SUCCESS;
}

CUresult cuCtxGetCurrent(CUcontext* context) {
  *context = (CUcontext)1;
  return CUDA_SUCCESS;
}

CUresult cuCtxGetDevice(CUdevice* device) {
  *device = 0;
  return CUDA_SUCCESS;
}

CUresult cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice device) { return cuCtxGetCurrent(context); }
CUresult cuCtxSetCurrent(CUcontext context) { return CUDA_SUCCESS; }
CUresult cuCtxSetLimit(CUlimit limit, size_t value) { return CUDA_SUCCESS; }

CUresult cuCtxGetLimit(size_t* value, CUlimit limit) {
  *value = 0;
  return CUDA_SUCCESS;
}

CUresult cuModuleLoadData(CUmodule* module, const void* image) {
  static const unsigned char elf[4] = {0x7f, 'E', 'L', 'F'};  // what ptxas writes
  *module = (CUmodule)image;
  return memcmp(image, elf, sizeof elf) == 0 ? CUDA_SUCCESS : CUDA_ERROR_INVALID_IMAGE;
}

CUresult cuModuleUnload(CUmodule module) { return CUDA_SUCCESS; }

CUresult cuModuleGetFunction(CUfunction* function, CUmodule module, const char* name) {
  *function = (CUfunction)module;
  return *name ? CUDA_SUCCESS : CUDA_ERROR_NOT_FOUND;
}

CUresult cuFuncGetAttribute(int* value, CUfunction_attribute attribute, CUfunction function) {
  *value = attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? THREADS : 0;
  return CUDA_SUCCESS;
}

CUresult cuFuncSetCacheConfig(CUfunction function, CUfunc_cache config) { return CUDA_SUCCESS; }

CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute attribute, int value) {
  return value <= SHARED ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

CUresult cuOccupancyMaxActiveClusters(int* clusters, CUfunction function, const CUlaunchConfig* config) {
  *clusters = MULTIPROCESSORS;
  return CUDA_SUCCESS;
}

CUresult cuPointerGetAttribute(void* value, CUpointer_attribute attribute, CUdeviceptr pointer) {
  memcpy(value, &pointer, sizeof pointer);  // all memory is the device's
  return CUDA_SUCCESS;
}

// https://docs.nvidia.com/cuda/cuda-driver-api/group__CUDA__TENSOR__MEMORY.html
CUresult cuTensorMapEncodeTiled(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* address,
                                const cuuint64_t* sizes, const cuuint64_t* strides, const cuuint32_t* box,
                                const cuuint32_t* steps, CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle,
                                CUtensorMapL2promotion promotion, CUtensorMapFloatOOBfill fill) {
  const int bytes = type == CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 || type == CU_TENSOR_MAP_DATA_TYPE_FLOAT16 ? 2
                    : type == CU_TENSOR_MAP_DATA_TYPE_FLOAT32                                          ? 4
                                                                                                       : 0;
  const int span[] = {0, 32, 64, 128};  // bytes that the inner box may have, by swizzle; 0: any
  if (!bytes || rank < 1 || rank > 5 || !address || (uintptr_t)address % 16) return CUDA_ERROR_INVALID_VALUE;
  for (cuuint32_t d = 0; d < rank; ++d) {
    if (sizes[d] == 0 || sizes[d] > 1ull << 32 || box[d] == 0 || box[d] > 256) return CUDA_ERROR_INVALID_VALUE;
    if (steps[d] == 0 || steps[d] > 8) return CUDA_ERROR_INVALID_VALUE;
    if (d + 1 < rank && (strides[d] % 16 || strides[d] >= 1ull << 40)) return CUDA_ERROR_INVALID_VALUE;
  }
  if ((box[0] * bytes) % 16 || (unsigned)swizzle >= sizeof span / sizeof *span) return CUDA_ERROR_INVALID_VALUE;
  if (span[swizzle] && box[0] * bytes > (unsigned)span[swizzle]) return CUDA_ERROR_INVALID_VALUE;
  memset(map, 0, sizeof *map);
  ++null_driver_tensor_maps;
  return CUDA_SUCCESS;
}

CUresult cuLaunchKernelEx(const CUlaunchConfig* config, CUfunction function, void** arguments, void** extra) {
  const unsigned long long threads = 1ull * config->blockDimX * config->blockDimY * config->blockDimZ;
  if (!function || threads == 0 || threads > THREADS || config->sharedMemBytes > SHARED)
    return CUDA_ERROR_INVALID_VALUE;
  if (!config->gridDimX || config->gridDimX > INT32_MAX || !config->gridDimY || config->gridDimY > UINT16_MAX ||
      !config->gridDimZ || config->gridDimZ > UINT16_MAX)
    return CUDA_ERROR_INVALID_VALUE;
  ++null_driver_launches;
  return CUDA_SUCCESS;
}
