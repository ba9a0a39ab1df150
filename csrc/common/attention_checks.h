// Checks of the index tensors' values, shared by the attention launchers; memory3_kernels/ops/_attention_args.py raises
// the same messages. Each returns M3_OK, or M3_INVALID with the name, place and value in m3_last_error().
#pragma once

#include "m3/records.h"

namespace m3 {

// What the tiles can hold: head dimension, heads, query heads per KV head.
m3_status check_sizes(int64_t dim, int64_t heads, int64_t kv_heads);
// `name`[0..count] starts at 0, never falls, ends at `rows` (or before, unless exact); no piece is longer than `bound`.
m3_status check_offsets(const char* name, const int32_t* offsets, int64_t count, int64_t rows, bool exact,
                        const char* bound_name, int64_t bound);
// Every sequence has at least as many keys as queries.
m3_status check_pairs(const int32_t* cu_q, const int32_t* cu_k, int64_t sequences);
// Every value of cu_q is a chunk boundary.
m3_status check_boundaries(const int32_t* cu_q, int64_t sequences, const int32_t* cu_chunk, int64_t chunks);
// Slots, lengths of the listed slots, head_map.
m3_status check_records(const M3Records& memory, int64_t kv_heads);
// kv_len is 0 or holds the new tokens and fits into the cache; the pages it covers exist; max_kv is large enough.
m3_status check_cache(const int32_t* kv_len, const int32_t* cu_q, int64_t sequences, const int32_t* block_table,
                      int64_t max_pages, int64_t page, int64_t pages, int64_t max_kv);

}  // namespace m3

#define M3_TRY(call)                              \
  do {                                            \
    const m3_status m3_status_ = (call);          \
    if (m3_status_ != M3_OK) return m3_status_;   \
  } while (0)
