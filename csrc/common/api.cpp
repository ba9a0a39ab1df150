// The op-independent part of the C ABI: errors, version, SIMD level, threading hook.
#include "m3/api.h"

#include <atomic>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "common/check.h"
#include "common/parallel.h"
#include "common/simd.h"

#if defined(M3_HAVE_X86_LEVELS)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace m3 {
namespace {

thread_local char last_error[512] = "";
std::atomic<int> current_level{-1};  // -1: not chosen yet
std::atomic<m3_parallel_fn> parallel_hook{nullptr};

constexpr const char* kLevelNames[] = {"none", "avx2", "avx512", "avx512bf16", "amx"};

#if defined(M3_HAVE_X86_LEVELS)
// Linux hands out the 8 KiB of tile registers on request, once for a process; a refusal (an old kernel, a signal stack too
// small for them) is final.
bool tiles_granted() {
  constexpr int kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  static const bool granted = syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
  return granted;
}
#endif

int best_level() {
#if defined(M3_EMULATE_AVX512)  // a build for tests: every level is AVX2 code
  return 4;
#elif defined(M3_HAVE_X86_LEVELS)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  const bool bf16 = __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni");
  const bool amx = __builtin_cpu_supports("amx-tile") && __builtin_cpu_supports("amx-bf16") &&
                   __builtin_cpu_supports("amx-int8");
  return avx2 ? (avx512 ? (bf16 ? (amx && tiles_granted() ? 4 : 3) : 2) : 1) : 0;
#else
  return 0;
#endif
}

int level_by_name(const char* name) {
  for (int i = 0; i < 5; ++i)
    if (std::strcmp(name, kLevelNames[i]) == 0) return i;
  return -1;
}

}  // namespace

m3_status fail(m3_status status, const char* format, ...) {
  va_list args;
  va_start(args, format);
  std::vsnprintf(last_error, sizeof last_error, format, args);
  va_end(args);
  return status;
}

SimdLevel simd_level() {
  int level = current_level.load(std::memory_order_relaxed);
  if (level < 0) {
    level = best_level();
    // An unusable M3_SIMD falls back to the best level here; the doctor reports it (m3_set_simd gives the reason).
    if (const char* wanted = std::getenv("M3_SIMD")) {
      const int forced = level_by_name(wanted);
      if (forced >= 0 && forced <= level) level = forced;
    }
    current_level.store(level, std::memory_order_relaxed);
  }
  return static_cast<SimdLevel>(level);
}

bool far_is_faster() {
#if defined(M3_HAVE_X86_LEVELS)
  // Zen 3 and 4: few misses of their first-level cache are on the way at once (docs/ops/memory_decode.md).
  static const bool far = [] {
    __builtin_cpu_init();
    return __builtin_cpu_is("amdfam19h") != 0;
  }();
  return far;
#else
  return false;
#endif
}

void parallel_range(int64_t n, int64_t grain, m3_range_fn body, void* context) {
  if (n <= 0) return;
  const m3_parallel_fn hook = parallel_hook.load(std::memory_order_relaxed);
  if (hook == nullptr || n <= grain)
    body(context, 0, n);
  else
    hook(n, grain, body, context);
}

}  // namespace m3

extern "C" {

const char* m3_last_error(void) { return m3::last_error; }
const char* m3_version(void) { return M3_VERSION; }
const char* m3_simd(void) { return m3::kLevelNames[static_cast<int>(m3::simd_level())]; }

m3_status m3_set_simd(const char* level) {
  const int wanted = m3::level_by_name(level);
  if (wanted < 0) return m3::fail(M3_INVALID, "SIMD level: expected none, avx2, avx512, avx512bf16 or amx, got %s", level);
  if (wanted > m3::best_level())
    return m3::fail(M3_UNSUPPORTED, "SIMD level %s: this CPU or build only has %s", level,
                    m3::kLevelNames[m3::best_level()]);
  m3::current_level.store(wanted, std::memory_order_relaxed);
  return M3_OK;
}

void m3_set_parallel(m3_parallel_fn hook) { m3::parallel_hook.store(hook, std::memory_order_relaxed); }

}  // extern "C"
