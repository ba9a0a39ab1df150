/* What the machine can do at most, for benchmarks: plain reads, and multiply-adds of bf16 pairs. */
#ifndef M3_CEILINGS_H
#define M3_CEILINGS_H

#include "m3/api.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Reads `bytes` (a multiple of 4096) once, on the threads of the parallel hook; returns a sum of what it read. */
M3_API uint32_t m3_ceiling_read(const void* data, int64_t bytes);
/* Runs `steps` rounds of independent sums of products of bf16 pairs `copies` times, on the threads of the parallel hook;
 * returns the multiply-adds done. */
M3_API int64_t m3_ceiling_dot(int64_t steps, int64_t copies);

#ifdef __cplusplus
}
#endif
#endif
