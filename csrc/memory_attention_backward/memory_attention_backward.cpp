#include "common/attention_checks.h"
#include "common/check.h"
#include "common/parallel.h"
#include "common/row_blocks.h"
#include "common/simd.h"
#include "memory_attention/validate.h"

M3_DECLARE_LEVELS(void, attention_query_gradient, const M3MemoryAttentionBackwardParams&, const RowBlocks&, int64_t,
                  int64_t)
M3_DECLARE_LEVELS(void, attention_context_gradient, const M3MemoryAttentionBackwardParams&, int64_t, int64_t, int64_t)
M3_DECLARE_LEVELS(void, attention_record_gradient, const M3MemoryAttentionBackwardParams&, int64_t, int64_t)

m3_status m3_memory_attention_backward_cpu(const M3MemoryAttentionBackwardParams* params) {
  const M3MemoryAttentionParams& p = params->forward;
  M3_TRY(m3::validate(p));
  M3_CHECK((params->grad_mem_k == nullptr) == (params->grad_mem_v == nullptr),
           "grad_mem_v: expected grad_mem_k and grad_mem_v both given or both null, got one of them");

  if (p.rows == 0) return M3_OK;  // all gradients are as the caller has cleared them
  const m3::RowBlocks rows = m3::row_blocks(p.max_chunk, p.heads / p.kv_heads);
  const auto queries = M3_AT_LEVEL(attention_query_gradient);
  m3::parallel_for(p.memory.chunks * rows.count * p.kv_heads, 1,
                   [&](int64_t begin, int64_t end) { queries(*params, rows, begin, end); });
  if (p.k != nullptr) {
    const auto context = M3_AT_LEVEL(attention_context_gradient);
    const int64_t blocks = (p.max_k + 63) / 64;  // of kBlock keys
    m3::parallel_for(p.sequences * blocks * p.kv_heads, 1,
                     [&](int64_t begin, int64_t end) { context(*params, blocks, begin, end); });
  }
  if (params->grad_mem_k != nullptr) {
    const auto records = M3_AT_LEVEL(attention_record_gradient);
    m3::parallel_for(p.memory.chunks * p.memory.refs * p.memory.heads, 1,
                     [&](int64_t begin, int64_t end) { records(*params, begin, end); });
  }
  return M3_OK;
}
