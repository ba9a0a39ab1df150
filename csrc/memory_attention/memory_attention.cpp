#include "m3/memory_attention.h"

#include "common/attention_checks.h"
#include "common/parallel.h"
#include "common/row_blocks.h"
#include "common/simd.h"
#include "memory_attention/validate.h"

M3_DECLARE_LEVELS(void, memory_attention, const M3MemoryAttentionParams&, const RowBlocks&, int64_t, int64_t)

namespace m3 {

m3_status validate(const M3MemoryAttentionParams& p) {
  const M3Records& memory = p.memory;
  M3_TRY(check_sizes(p.dim, p.heads, p.kv_heads));
  M3_TRY(check_offsets("cu_q", p.cu_q, p.sequences, p.rows, true, "max_q", p.max_q));
  if (p.k != nullptr) {
    M3_TRY(check_offsets("cu_k", p.cu_k, p.sequences, p.keys, false, "max_k", p.max_k));
    M3_TRY(check_pairs(p.cu_q, p.cu_k, p.sequences));
  }
  M3_TRY(check_offsets("cu_chunk", p.cu_chunk, memory.chunks, p.rows, true, "max_chunk", p.max_chunk));
  M3_TRY(check_boundaries(p.cu_q, p.sequences, p.cu_chunk, memory.chunks));
  return check_records(memory, p.kv_heads);
}

}  // namespace m3

m3_status m3_memory_attention_check(const M3MemoryAttentionParams* p) { return m3::validate(*p); }

m3_status m3_memory_attention_cpu(const M3MemoryAttentionParams* p) {
  M3_TRY(m3::validate(*p));
  const auto kernel = M3_AT_LEVEL(memory_attention);
  const m3::RowBlocks blocks = m3::row_blocks(p->max_chunk, p->heads / p->kv_heads);
  const int64_t items = p->memory.chunks * blocks.count * p->kv_heads;
  m3::parallel_for(items, 1, [&](int64_t begin, int64_t end) { kernel(*p, blocks, begin, end); });
  return M3_OK;
}
