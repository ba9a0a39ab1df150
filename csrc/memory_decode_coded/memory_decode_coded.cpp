#include "m3/memory_decode_coded.h"

#include "common/attention_checks.h"
#include "common/codec.h"
#include "common/parallel.h"
#include "common/row_blocks.h"
#include "memory_decode/validate.h"

M3_DECLARE_LEVELS(void, memory_decode_coded, const M3MemoryDecodeCodedParams&, const RowBlocks&, int64_t, int64_t)

m3_status m3_memory_decode_coded_cpu(const M3MemoryDecodeCodedParams* params) {
  const M3MemoryDecodeParams& p = params->decode;
  M3_TRY(m3::check_book(params->k_book));
  M3_TRY(m3::check_book(params->v_book));
  M3_CHECK(params->k_book.dim == p.dim && params->v_book.dim == p.dim,
           "k_book, v_book: expected vectors of length %lld, got %lld and %lld", static_cast<long long>(p.dim),
           static_cast<long long>(params->k_book.dim), static_cast<long long>(params->v_book.dim));
  M3_TRY(m3::validate(p));
  const auto kernel = M3_AT_LEVEL(memory_decode_coded);
  const m3::RowBlocks blocks = m3::row_blocks(p.max_q, p.heads / p.kv_heads);
  m3::parallel_for(p.sequences * blocks.count * p.kv_heads, 1,
                   [&](int64_t begin, int64_t end) { kernel(*params, blocks, begin, end); });
  return M3_OK;
}
