/* gather_memory: the chosen rows of k and v in record layout; zeros where the index is -1. */
#ifndef M3_GATHER_MEMORY_H
#define M3_GATHER_MEMORY_H

#include "m3/api.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct M3GatherMemoryParams {
  int64_t refs, rows, heads, tokens, dim; /* N, T, Hkv, K, D */
  int64_t element_size;                   /* bytes of one element of k, v and kv */
  const void* k;                          /* [N, T, Hkv, D], last stride 1 */
  const void* v;                          /* same */
  const int32_t* index;                   /* [N, Hkv, K] contiguous, -1..T-1 */
  void* kv;                               /* [N, 2, Hkv, K, D] contiguous */
  int64_t k_stride[3];                    /* of N, T, Hkv, in elements */
  int64_t v_stride[3];
} M3GatherMemoryParams;

M3_API m3_status m3_gather_memory_cpu(const M3GatherMemoryParams* params);

#ifdef __cplusplus
}
#endif
#endif
