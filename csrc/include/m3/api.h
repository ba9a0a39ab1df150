/* The C ABI shared by every op: status codes, element types, errors, SIMD level, threading.
 * Plain C11, no torch, no CUDA. Launchers never throw, print, exit or allocate outputs. */
#ifndef M3_API_H
#define M3_API_H

#include <stdint.h>

#if defined(__GNUC__)
#define M3_API __attribute__((visibility("default")))
#else
#define M3_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

typedef enum m3_status {
  M3_OK = 0,
  M3_INVALID = 1,     /* an argument is out of its range: m3_last_error() names it */
  M3_UNSUPPORTED = 2, /* legal, but not by this build (element type, SIMD level) */
} m3_status;

typedef enum m3_dtype {
  M3_F32 = 0,
  M3_F16 = 1,
  M3_BF16 = 2,
} m3_dtype;

/* Text of this thread's last failed call; valid until the next one. */
M3_API const char* m3_last_error(void);
M3_API const char* m3_version(void);

/* "none", "avx2", "avx512", "avx512bf16" or "amx": the level kernels run at. First use reads M3_SIMD, else takes the best
 * that CPU and kernel have. */
M3_API const char* m3_simd(void);
/* Forces a level; M3_INVALID for an unknown name, M3_UNSUPPORTED where the CPU or the build lacks it. */
M3_API m3_status m3_set_simd(const char* level);

/* Threading belongs to the caller: kernels are cut into [begin, end) ranges and run by this hook, serially by default. */
typedef void (*m3_range_fn)(void* context, int64_t begin, int64_t end);
typedef void (*m3_parallel_fn)(int64_t n, int64_t grain, m3_range_fn body, void* context);
M3_API void m3_set_parallel(m3_parallel_fn hook);

#ifdef __cplusplus
}
#endif
#endif
