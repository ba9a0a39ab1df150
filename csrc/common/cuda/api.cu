// The op-independent part of m3/cuda.h.
#include <cstdarg>
#include <cstdio>

#include "common/cuda/launch.cuh"
#include "m3/cuda.h"

namespace m3::gpu {
namespace {
thread_local char last_error[512] = "";
thread_local bool dry = false;
}  // namespace

bool dry_run() { return dry; }

m3_status fail(m3_status status, const char* format, ...) {
  va_list args;
  va_start(args, format);
  std::vsnprintf(last_error, sizeof last_error, format, args);
  va_end(args);
  return status;
}

}  // namespace m3::gpu

extern "C" {
const char* m3_cuda_last_error(void) { return m3::gpu::last_error; }
const char* m3_cuda_archs(void) { return M3_CUDA_ARCHS; }
void m3_cuda_dry_run(int on) { m3::gpu::dry = on != 0; }
}
