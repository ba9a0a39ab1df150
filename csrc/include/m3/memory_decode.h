/* memory_decode: a few new tokens per sequence over a KV cache and memory records, in one softmax. */
#ifndef M3_MEMORY_DECODE_H
#define M3_MEMORY_DECODE_H

#include "m3/records.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Strides in elements, the last one is 1 and not given. */
typedef struct M3MemoryDecodeParams {
  int64_t rows, heads, kv_heads, dim, sequences; /* Tq, Hq, Hkv, D, B */
  m3_dtype dtype;
  const void* q; /* [Tq, Hq, D] */
  int64_t q_stride[2];
  const void* k_cache; /* [B, N, Hkv, D], or [pages, page, Hkv, D] with block_table */
  const void* v_cache;
  int64_t pages, page; /* the first two sizes of the cache, whichever they mean */
  int64_t k_stride[3], v_stride[3];
  const int32_t* kv_len;      /* [B] */
  const int32_t* block_table; /* [B, max_pages] contiguous, or null */
  int64_t max_pages;
  const int32_t* cu_q; /* [B + 1] */
  M3Records memory;    /* chunks = B */
  float scale;
  int64_t max_q, max_kv;
  void* out;   /* [Tq, Hq, D] contiguous */
  float* lse;  /* [Tq, Hq] contiguous */
  float* mass; /* [Tq, Hq, R] contiguous */
} M3MemoryDecodeParams;

M3_API m3_status m3_memory_decode_cpu(const M3MemoryDecodeParams* params);

/* M3_OK, or M3_INVALID for a size, or a value of an index tensor, that m3_memory_decode_cpu would refuse. Index tensors
 * are on the host; nothing else is looked at. */
M3_API m3_status m3_memory_decode_check(const M3MemoryDecodeParams* params);

#ifdef __cplusplus
}
#endif
#endif
