/* scatter_memory: records into slots of an arena. Slot -1 skips a record; of equal slots the last record stays. */
#ifndef M3_SCATTER_MEMORY_H
#define M3_SCATTER_MEMORY_H

#include "m3/api.h"

#ifdef __cplusplus
extern "C" {
#endif

#define M3_SCATTER_MAX_DIMS 8

typedef struct M3ScatterMemoryParams {
  int64_t slots, records;            /* S, N */
  int64_t dims;                      /* dimensions of one record, below M3_SCATTER_MAX_DIMS */
  int64_t size[M3_SCATTER_MAX_DIMS]; /* of one record */
  int64_t element_size;              /* 1, 2, 4, 8 or 16 bytes */
  const void* record;                /* [N, size...] */
  const int32_t* slot;               /* [N] contiguous, -1..S-1 */
  void* arena;                       /* [S, size...]; does not overlap `record` */
  int64_t slot_stride, record_stride; /* of S and N, in elements */
  int64_t arena_strides[M3_SCATTER_MAX_DIMS];
  int64_t record_strides[M3_SCATTER_MAX_DIMS];
} M3ScatterMemoryParams;

M3_API m3_status m3_scatter_memory_cpu(const M3ScatterMemoryParams* params);

#ifdef __cplusplus
}
#endif
#endif
