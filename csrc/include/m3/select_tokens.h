/* select_tokens: the K rows of each reference and KV head that receive most attention (docs/ops/select_tokens.md). */
#ifndef M3_SELECT_TOKENS_H
#define M3_SELECT_TOKENS_H

#include "m3/api.h"

#ifdef __cplusplus
extern "C" {
#endif

#define M3_SELECT_MAX_TOKENS 512

typedef enum m3_select_rule {
  M3_SELECT_RECEIVED = 0, /* softmax over the own rows, summed over queries */
  M3_SELECT_EXP = 1,      /* sum of exp(score), ranked by its logarithm */
  M3_SELECT_CAUSAL = 2,   /* softmax over the rows up to the query's, prefix included */
} m3_select_rule;

typedef struct M3SelectTokensParams {
  int64_t refs, rows, q_heads, kv_heads, dim; /* N, T, Hq, Hkv (divides Hq), D */
  int64_t tokens;                             /* K, 1..M3_SELECT_MAX_TOKENS */
  int64_t start;                              /* rows before it are a prefix */
  int64_t workers;                            /* pieces the work is cut into, each with a workspace; 1 or more */
  float scale;
  m3_select_rule rule;
  m3_dtype dtype;        /* of q and k */
  const void* q;         /* [N, T, Hq, D], last stride 1 */
  const void* k;         /* [N, T, Hkv, D], last stride 1 */
  const int32_t* length; /* [N], 0..T */
  int32_t* index;        /* [N, Hkv, K] contiguous */
  float* workspace;      /* workers * m3_select_tokens_workspace() floats */
  int64_t q_stride[3];   /* of N, T, Hq, in elements */
  int64_t k_stride[3];   /* of N, T, Hkv */
} M3SelectTokensParams;

/* Floats of workspace per worker. */
M3_API int64_t m3_select_tokens_workspace(const M3SelectTokensParams* params);
M3_API m3_status m3_select_tokens_cpu(const M3SelectTokensParams* params);

#ifdef __cplusplus
}
#endif
#endif
