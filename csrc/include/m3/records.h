/* The memory operands of the attention ops: records by arena slot, and which of them each chunk reads. */
#ifndef M3_RECORDS_H
#define M3_RECORDS_H

#include "m3/api.h"

typedef struct M3Records {
  int64_t slots, heads, tokens; /* S, Hm, K */
  const void* k;                /* [S, Hm, K, D], strides in elements, last one 1 */
  const void* v;
  int64_t k_stride[3], v_stride[3];
  const float* bias; /* [S, Hm, K] or null; natural-log units, -inf removes the token */
  int64_t bias_stride[2];
  int64_t chunks, refs;    /* C, R */
  const int32_t* slot;     /* [C, R] contiguous; -1: none */
  const int32_t* length;   /* [S] valid tokens; later ones are never read */
  const int32_t* head_map; /* [Hkv]: record head or -1; null: identity */
} M3Records;

#endif
