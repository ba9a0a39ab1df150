/* memory_attention: packed sequences whose query chunks also read memory records, in one softmax; and its gradient. */
#ifndef M3_MEMORY_ATTENTION_H
#define M3_MEMORY_ATTENTION_H

#include "m3/records.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Strides in elements, the last one is 1 and not given. */
typedef struct M3MemoryAttentionParams {
  int64_t rows, keys, heads, kv_heads, dim, sequences; /* Tq, Tk, Hq, Hkv, D, B */
  m3_dtype dtype;
  const void* q; /* [Tq, Hq, D] */
  const void* k; /* [Tk, Hkv, D], or null: memory only */
  const void* v;
  int64_t q_stride[2], k_stride[2], v_stride[2];
  const int32_t* cu_q;     /* [B + 1] */
  const int32_t* cu_k;     /* [B + 1] */
  const int32_t* cu_chunk; /* [C + 1] */
  M3Records memory;
  float scale;
  int64_t max_q, max_k, max_chunk;
  void* out;   /* [Tq, Hq, D] contiguous */
  float* lse;  /* [Tq, Hq] contiguous */
  float* mass; /* [Tq, Hq, R] contiguous */
} M3MemoryAttentionParams;

M3_API m3_status m3_memory_attention_cpu(const M3MemoryAttentionParams* params);
/* M3_OK, or M3_INVALID for a size, or a value of an index tensor, that m3_memory_attention_cpu would refuse. Index tensors
 * are on the host; nothing else is looked at. */
M3_API m3_status m3_memory_attention_check(const M3MemoryAttentionParams* params);

/* `forward` as it was called, with its results in out and lse (mass unused). All of these are contiguous. */
typedef struct M3MemoryAttentionBackwardParams {
  M3MemoryAttentionParams forward;
  const void* grad_out;   /* [Tq, Hq, D] */
  const float* grad_lse;  /* [Tq, Hq] */
  void* grad_q;           /* [Tq, Hq, D] */
  void* grad_k;           /* [Tk, Hkv, D], zeros; null with k */
  void* grad_v;           /* same */
  void* grad_mem_k;       /* [S, Hm, K, D], zeros; null: not wanted */
  void* grad_mem_v;       /* same */
  float* grad_mem_bias;   /* [S, Hm, K], zeros; null: not wanted */
} M3MemoryAttentionBackwardParams;

M3_API m3_status m3_memory_attention_backward_cpu(const M3MemoryAttentionBackwardParams* params);

#ifdef __cplusplus
}
#endif
#endif
