#include "common/attention_checks.h"

#include "common/check.h"

namespace m3 {
namespace {
typedef long long ll;  // what %lld takes everywhere
}

m3_status check_sizes(int64_t dim, int64_t heads, int64_t kv_heads) {
  M3_CHECK(dim % 8 == 0 && dim >= 8 && dim <= 256,
           "q: expected a head dimension that is a multiple of 8 up to 256, got %lld", ll(dim));
  M3_CHECK(kv_heads > 0 && heads >= kv_heads && heads % kv_heads == 0,
           "q: expected a number of heads that is a multiple of the %lld KV heads, got %lld", ll(kv_heads), ll(heads));
  M3_CHECK(heads / kv_heads <= 64, "q: expected at most 64 query heads per KV head, got %lld", ll(heads / kv_heads));
  return M3_OK;
}

m3_status check_offsets(const char* name, const int32_t* offsets, int64_t count, int64_t rows, bool exact,
                        const char* bound_name, int64_t bound) {
  M3_CHECK(offsets[0] == 0, "%s[0]: expected 0, got %d", name, offsets[0]);
  int64_t longest = 0;
  for (int64_t i = 1; i <= count; ++i) {
    M3_CHECK(offsets[i] >= offsets[i - 1], "%s[%lld]: expected at least %s[%lld] = %d, got %d", name, ll(i), name,
             ll(i - 1), offsets[i - 1], offsets[i]);
    const int64_t length = int64_t{offsets[i]} - offsets[i - 1];
    longest = length > longest ? length : longest;
  }
  M3_CHECK(offsets[count] <= rows && (!exact || offsets[count] == rows),
           "%s[%lld]: expected %s%lld, the number of rows, got %d", name, ll(count), exact ? "" : "at most ", ll(rows),
           offsets[count]);
  M3_CHECK(longest <= bound, "%s: expected at least %lld, the longest piece of %s, got %lld", bound_name, ll(longest),
           name, ll(bound));
  return M3_OK;
}

m3_status check_pairs(const int32_t* cu_q, const int32_t* cu_k, int64_t sequences) {
  for (int64_t b = 0; b < sequences; ++b) {
    const int32_t queries = cu_q[b + 1] - cu_q[b], keys = cu_k[b + 1] - cu_k[b];
    M3_CHECK(keys >= queries, "cu_k: expected at least %d keys in sequence %lld, as many as it has queries, got %d",
             queries, ll(b), keys);
  }
  return M3_OK;
}

m3_status check_boundaries(const int32_t* cu_q, int64_t sequences, const int32_t* cu_chunk, int64_t chunks) {
  int64_t c = 0;
  for (int64_t b = 0; b <= sequences; ++b) {
    while (c < chunks && cu_chunk[c] < cu_q[b]) ++c;
    M3_CHECK(cu_chunk[c] == cu_q[b],
             "cu_chunk: expected a boundary at cu_q[%lld] = %d, where a sequence ends, got none", ll(b), cu_q[b]);
  }
  return M3_OK;
}

m3_status check_records(const M3Records& memory, int64_t kv_heads) {
  for (int64_t i = 0; i < memory.chunks * memory.refs; ++i) {
    const int32_t slot = memory.slot[i];
    M3_CHECK(slot >= -1 && slot < memory.slots, "mem_slot[%lld, %lld]: expected -1 or a slot below %lld, got %d",
             ll(i / memory.refs), ll(i % memory.refs), ll(memory.slots), slot);
    if (slot < 0) continue;
    M3_CHECK(memory.length[slot] >= 0 && memory.length[slot] <= memory.tokens, "mem_len[%d]: expected 0..%lld, got %d",
             slot, ll(memory.tokens), memory.length[slot]);
  }
  for (int64_t h = 0; memory.head_map && h < kv_heads; ++h)
    M3_CHECK(memory.head_map[h] >= -1 && memory.head_map[h] < memory.heads,
             "head_map[%lld]: expected -1 or a record head below %lld, got %d", ll(h), ll(memory.heads),
             memory.head_map[h]);
  return M3_OK;
}

m3_status check_cache(const int32_t* kv_len, const int32_t* cu_q, int64_t sequences, const int32_t* block_table,
                      int64_t max_pages, int64_t page, int64_t pages, int64_t max_kv) {
  const int64_t capacity = block_table ? page * max_pages : page;
  int64_t longest = 0;
  for (int64_t b = 0; b < sequences; ++b) {
    const int32_t length = kv_len[b], fresh = cu_q[b + 1] - cu_q[b];
    M3_CHECK(length == 0 || (length >= fresh && length <= capacity),
             "kv_len[%lld]: expected 0, or %d (new tokens) to %lld (capacity of the cache), got %d", ll(b), fresh,
             ll(capacity), length);
    for (int64_t i = 0; block_table && i * page < length; ++i) {
      const int32_t at = block_table[b * max_pages + i];
      M3_CHECK(at >= 0 && at < pages, "block_table[%lld, %lld]: expected a page below %lld, got %d", ll(b), ll(i),
               ll(pages), at);
    }
    longest = length > longest ? length : longest;
  }
  M3_CHECK(longest <= max_kv, "max_kv: expected at least %lld, the largest kv_len, got %lld", ll(longest), ll(max_kv));
  return M3_OK;
}

}  // namespace m3
