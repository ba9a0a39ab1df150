/* merge_attention_states: two attention results over disjoint key sets become the result over their union. */
#ifndef M3_MERGE_ATTENTION_STATES_H
#define M3_MERGE_ATTENTION_STATES_H

#include "m3/api.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct M3MergeAttentionStatesParams {
  int64_t tokens, heads, dim;
  m3_dtype dtype;     /* of out_a, out_b, out */
  const void* out_a;  /* [tokens, heads, dim] contiguous */
  const void* out_b;  /* same */
  const float* lse_a; /* [tokens, heads] contiguous, natural log; -inf: saw nothing */
  const float* lse_b;
  void* out;  /* [tokens, heads, dim] contiguous */
  float* lse; /* [tokens, heads] */
} M3MergeAttentionStatesParams;

M3_API m3_status m3_merge_attention_states_cpu(const M3MergeAttentionStatesParams* params);

#ifdef __cplusplus
}
#endif
#endif
