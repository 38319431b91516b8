// A libcuda for Triton's own launcher, without a GPU: it keeps what kernels are launched with, and
// what tiles are described with, and launches nothing.

#include <cuda.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

static char text[1 << 20];
static size_t used = 0;
static int num_params = 0;

static void say(const char* format, ...) {
  va_list args;
  va_start(args, format);
  used += (size_t)vsnprintf(text + used, sizeof text - used, format, args);
  va_end(args);
  if (used >= sizeof text) used = sizeof text - 1;
}

// The next launch has so many parameters, and nothing has been said of it.
void stub_begin(int count) {
  num_params = count;
  used = 0;
  text[0] = 0;
}

const char* stub_said(void) { return text; }

CUresult cuLaunchKernelEx(const CUlaunchConfig* config, CUfunction function, void** params,
                          void** extra) {
  (void)function;
  (void)extra;
  say("launch %u %u %u, %u threads, %u bytes, stream %p, params", config->gridDimX,
      config->gridDimY, config->gridDimZ, config->blockDimX, config->sharedMemBytes,
      (void*)config->hStream);
  for (int i = 0; i < num_params; ++i) {
    uint32_t bits;
    memcpy(&bits, params[i], sizeof bits);
    say(" %x", bits);
  }
  say("\n");
  return CUDA_SUCCESS;
}

// With what CUDA's driver API asks of a tensor map without interleaving.
CUresult cuTensorMapEncodeTiled(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank,
                                void* address, const cuuint64_t* sizes, const cuuint64_t* strides,
                                const cuuint32_t* box, const cuuint32_t* steps,
                                CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle,
                                CUtensorMapL2promotion promotion, CUtensorMapFloatOOBfill fill) {
  (void)promotion;
  (void)fill;
  const int is_16_bit =
      type == CU_TENSOR_MAP_DATA_TYPE_FLOAT16 || type == CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  const unsigned row_bytes = box[0] * (is_16_bit ? 2 : 4);
  const unsigned most_bytes = swizzle == CU_TENSOR_MAP_SWIZZLE_NONE  ? 1u << 30
                              : swizzle == CU_TENSOR_MAP_SWIZZLE_32B ? 32
                              : swizzle == CU_TENSOR_MAP_SWIZZLE_64B ? 64
                                                                     : 128;
  int wrong = (uintptr_t)map % 64 != 0 || (uintptr_t)address % 16 != 0 || rank < 1 || rank > 5;
  wrong |= interleave != CU_TENSOR_MAP_INTERLEAVE_NONE || row_bytes % 16 != 0;
  wrong |= row_bytes > most_bytes;
  for (cuuint32_t i = 0; i < rank; ++i) {
    wrong |= sizes[i] == 0 || sizes[i] > (1ull << 32) || box[i] == 0 || box[i] > 256;
    wrong |= steps[i] == 0 || steps[i] > 8;
    wrong |= i + 1 < rank && (strides[i] % 16 != 0 || strides[i] >= (1ull << 40));
  }
  say("%s map of %u axes\n", wrong ? "wrong" : "right", rank);
  memset(map, 0, sizeof *map);
  return wrong ? CUDA_ERROR_INVALID_VALUE : CUDA_SUCCESS;
}

CUresult cuGetErrorString(CUresult error, const char** name) {
  (void)error;
  *name = "refused";
  return CUDA_SUCCESS;
}

CUresult cuCtxGetCurrent(CUcontext* context) {
  *context = (CUcontext)1;
  return CUDA_SUCCESS;
}

CUresult cuDriverGetVersion(int* version) {
  *version = CUDA_VERSION;
  return CUDA_SUCCESS;
}

// A pointer of a device is what a tensor has.
CUresult cuPointerGetAttribute(void* data, CUpointer_attribute attribute, CUdeviceptr pointer) {
  (void)attribute;
  *(CUdeviceptr*)data = pointer;
  return CUDA_SUCCESS;
}

// What Triton links, and calls with nothing that counts here, whatever its arguments are.
__attribute__((used)) static int nothing(void) { return CUDA_SUCCESS; }
#define UNUSED(name) __asm__(".globl " #name "\n.set " #name ", nothing\n");
UNUSED(cuInit)
UNUSED(cuCtxGetDevice)
UNUSED(cuModuleUnload)
UNUSED(cuStreamIsCapturing)
UNUSED(cuDeviceGet)
UNUSED(cuDeviceGetAttribute)
UNUSED(cuDevicePrimaryCtxRetain)
UNUSED(cuCtxSetCurrent)
UNUSED(cuCtxSetLimit)
UNUSED(cuCtxGetLimit)
UNUSED(cuFuncGetAttribute)
UNUSED(cuFuncSetAttribute)
UNUSED(cuFuncSetCacheConfig)
UNUSED(cuModuleLoadData)
UNUSED(cuModuleGetFunction)
UNUSED(cuOccupancyMaxActiveClusters)
