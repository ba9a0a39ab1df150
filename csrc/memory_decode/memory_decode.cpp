#include "m3/memory_decode.h"

#include "common/attention_checks.h"
#include "common/parallel.h"
#include "common/row_blocks.h"
#include "common/simd.h"
#include "memory_decode/validate.h"

M3_DECLARE_LEVELS(void, memory_decode, const M3MemoryDecodeParams&, const RowBlocks&, int64_t, int64_t)

namespace m3 {

m3_status validate(const M3MemoryDecodeParams& p) {
  M3_TRY(check_sizes(p.dim, p.heads, p.kv_heads));
  M3_TRY(check_offsets("cu_q", p.cu_q, p.sequences, p.rows, true, "max_q", p.max_q));
  M3_TRY(check_cache(p.kv_len, p.cu_q, p.sequences, p.block_table, p.max_pages, p.page, p.pages, p.max_kv));
  return check_records(p.memory, p.kv_heads);
}

}  // namespace m3

m3_status m3_memory_decode_check(const M3MemoryDecodeParams* p) { return m3::validate(*p); }

m3_status m3_memory_decode_cpu(const M3MemoryDecodeParams* p) {
  M3_TRY(m3::validate(*p));
  const auto kernel = M3_AT_LEVEL(memory_decode);
  const m3::RowBlocks blocks = m3::row_blocks(p->max_q, p->heads / p->kv_heads);
  m3::parallel_for(p->sequences * blocks.count * p->kv_heads, 1,
                   [&](int64_t begin, int64_t end) { kernel(*p, blocks, begin, end); });
  return M3_OK;
}
