// Launching a kernel, and what launchers share: errors as status and text, nothing thrown, nothing waited for.
#pragma once

#include <tuple>

#include "common/cuda/device.cuh"
#include "m3/api.h"

namespace m3::gpu {

// Formats like printf into m3_cuda_last_error() and returns `status`.
m3_status fail(m3_status status, const char* format, ...) __attribute__((format(printf, 2, 3)));

// Whether this thread only wants to know if a launch would be taken.
bool dry_run();

struct Grid {
  int64_t blocks;
  int threads;
  int64_t shared;  // bytes per block
};

constexpr int64_t kMostBlocks = 0x7FFFFFFF;

#if defined(__CUDACC__)

// This library on this device or driver, whatever the arguments: another backend may do.
inline bool runs_nowhere(cudaError_t error) {
  return error == cudaErrorNoKernelImageForDevice || error == cudaErrorInvalidDeviceFunction ||
         error == cudaErrorUnsupportedPtxVersion || error == cudaErrorInsufficientDriver;
}

// Blocks may use more than 48 KiB of shared memory only once the kernel has been told so, on each device.
inline m3_status allow_shared(const void* kernel, int64_t bytes) {
  if (bytes <= 48 << 10) return M3_OK;
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
  if (error == cudaSuccess) return M3_OK;
  (void)cudaGetLastError();
  return fail(M3_UNSUPPORTED, "%lld bytes of shared memory per block: %s", static_cast<long long>(bytes),
              cudaGetErrorString(error));
}

template <class... Params>
m3_status run(void (*kernel)(Params...), const Grid& grid, void* stream, std::tuple<Params...> params) {
  const void* address = reinterpret_cast<const void*>(kernel);
  const m3_status allowed = allow_shared(address, grid.shared);
  if (allowed != M3_OK) return allowed;
  const cudaError_t error = std::apply(
      [&](Params&... each) {
        void* pointers[] = {static_cast<void*>(&each)...};
        return cudaLaunchKernel(address, dim3(static_cast<unsigned>(grid.blocks)),
                                dim3(static_cast<unsigned>(grid.threads)), pointers, static_cast<size_t>(grid.shared),
                                static_cast<cudaStream_t>(stream));
      },
      params);
  if (error == cudaSuccess) return M3_OK;
  (void)cudaGetLastError();
  return fail(runs_nowhere(error) ? M3_UNSUPPORTED : M3_INVALID, "a kernel could not be launched: %s",
              cudaGetErrorString(error));
}

#else

template <class... Params>
m3_status run(void (*kernel)(Params...), const Grid& grid, void*, std::tuple<Params...> params) {
  const std::string error = std::apply(
      [&](Params&... each) {
        const void* arguments[] = {&each...};
        const size_t sizes[] = {sizeof(Params)...};
        const simt::Launch launch{reinterpret_cast<const void*>(kernel),
                                  static_cast<unsigned>(grid.blocks),
                                  static_cast<unsigned>(grid.threads),
                                  static_cast<size_t>(grid.shared),
                                  static_cast<int>(sizeof...(Params)),
                                  arguments,
                                  sizes};
        return simt::launch(launch, [&] { kernel(each...); });
      },
      params);
  return error.empty() ? M3_OK : fail(M3_INVALID, "%s", error.c_str());
}

#endif

// Queues `kernel` with parameters by value; a grid without blocks is nothing to do.
template <class... Params, class... Args>
m3_status launch(void (*kernel)(Params...), const Grid& grid, void* stream, const Args&... args) {
  if (grid.blocks == 0) return M3_OK;
  if (grid.blocks > kMostBlocks)
    return fail(M3_UNSUPPORTED, "%lld blocks, at most %lld", static_cast<long long>(grid.blocks),
                static_cast<long long>(kMostBlocks));
  if (dry_run()) return M3_OK;
  return run<Params...>(kernel, grid, stream, std::tuple<Params...>(args...));
}

}  // namespace m3::gpu
