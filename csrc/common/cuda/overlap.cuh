// Two kernels of one call: the second one's blocks may be there already when the first one ends, and its launch costs
// nothing. From compute capability 9.0 on; before, and on the host of tests/simt, they run one after the other.
// CUDA C++ Programming Guide, "Programmatic Dependent Launch and Synchronization".
#pragma once

#include "common/cuda/launch.cuh"

namespace m3::gpu {

// In the first kernel: the second may be started as soon as every block has said so, or ended.
M3_DEVICE void let_next_start() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;\n" ::: "memory");
#endif
}

// In the second, before it reads: until the first has ended and what it wrote can be seen.
M3_DEVICE void wait_for_previous() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;\n" ::: "memory");
#endif
}

#if defined(__CUDACC__)

inline bool overlaps_kernels() {
  int device = 0, major = 0;
  return cudaGetDevice(&device) == cudaSuccess &&
         cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess && major >= 9;
}

// As launch(), behind a kernel just queued; `kernel` calls wait_for_previous(), and needs at most 48 KiB of shared
// memory.
template <class... Params, class... Args>
m3_status launch_behind(void (*kernel)(Params...), const Grid& grid, void* stream, const Args&... args) {
  if (grid.blocks > 0 && grid.blocks <= kMostBlocks && !dry_run() && overlaps_kernels()) {
    cudaLaunchAttribute overlap{};
    overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    overlap.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(static_cast<unsigned>(grid.blocks));
    config.blockDim = dim3(static_cast<unsigned>(grid.threads));
    config.dynamicSmemBytes = static_cast<size_t>(grid.shared);
    config.stream = static_cast<cudaStream_t>(stream);
    config.attrs = &overlap;
    config.numAttrs = 1;
    std::tuple<Params...> params(args...);
    const cudaError_t error = std::apply(
        [&](Params&... each) {
          void* pointers[] = {static_cast<void*>(&each)...};
          return cudaLaunchKernelExC(&config, reinterpret_cast<const void*>(kernel), pointers);
        },
        params);
    if (error == cudaSuccess) return M3_OK;
    (void)cudaGetLastError();  // a plain launch works, or says why not
  }
  return launch(kernel, grid, stream, args...);
}

#else

template <class... Params, class... Args>
m3_status launch_behind(void (*kernel)(Params...), const Grid& grid, void* stream, const Args&... args) {
  return launch(kernel, grid, stream, args...);
}

#endif

}  // namespace m3::gpu
