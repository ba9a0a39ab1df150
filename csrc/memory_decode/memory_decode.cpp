#include "m3/memory_decode.h"

#include "common/attention_checks.h"
#include "common/check.h"
#include "common/parallel.h"
#include "common/row_blocks.h"
#include "common/simd.h"
#include "memory_decode/validate.h"

M3_DECLARE_LEVELS(void, memory_decode, const M3MemoryDecodeParams&, const RowBlocks&, int64_t, int64_t)

namespace m3 {

m3_status validate(const M3MemoryDecodeParams& params) {
  const M3MemoryDecodeParams* p = &params;
  M3_CHECK(p->dim % 8 == 0 && p->dim >= 8 && p->dim <= 256, "q: expected a head dimension that is a multiple of 8 up to 256, got %lld",
           static_cast<long long>(p->dim));
  M3_CHECK(p->kv_heads > 0 && p->heads >= p->kv_heads && p->heads % p->kv_heads == 0,
           "q: expected a number of heads that is a multiple of the %lld KV heads, got %lld",
           static_cast<long long>(p->kv_heads), static_cast<long long>(p->heads));
  M3_TRY(check_offsets("cu_q", p->cu_q, p->sequences, p->rows, true, "max_q", p->max_q));
  M3_TRY(check_cache(p->kv_len, p->cu_q, p->sequences, p->block_table, p->max_pages, p->page, p->pages, p->max_kv));
  return check_records(p->memory, p->kv_heads);
}

}  // namespace m3

m3_status m3_memory_decode_cpu(const M3MemoryDecodeParams* p) {
  M3_TRY(m3::validate(*p));
  const auto kernel = M3_AT_LEVEL(memory_decode);
  const m3::RowBlocks blocks = m3::row_blocks(p->max_q, p->heads / p->kv_heads);
  m3::parallel_for(p->sequences * blocks.count * p->kv_heads, 1,
                   [&](int64_t begin, int64_t end) { kernel(*p, blocks, begin, end); });
  return M3_OK;
}
