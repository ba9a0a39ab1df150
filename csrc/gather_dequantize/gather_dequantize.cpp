// One task per (record, head): its K codes lie back to back, so the decoder of vq_dequantize serves them in one call.
#include "m3/gather_dequantize.h"

#include <cstring>
#include <type_traits>

#include "common/codec.h"
#include "common/parallel.h"

static_assert(std::is_trivially_copyable_v<M3GatherDequantizeParams> &&
              std::is_standard_layout_v<M3GatherDequantizeParams>);

m3_status m3_gather_dequantize_cpu(const M3GatherDequantizeParams* p) {
  M3_CHECK(p->slots >= 0 && p->heads >= 0 && p->records >= 0 && p->tokens > 0, "gather_dequantize: negative size");
  if (const m3_status status = m3::check_book(p->book)) return status;
  for (int64_t r = 0; r < p->records; ++r)
    M3_CHECK(p->slot[r] >= -1 && p->slot[r] < p->slots, "slots[%lld]: expected -1..%lld, got %d",
             static_cast<long long>(r), static_cast<long long>(p->slots - 1), p->slot[r]);
  const auto kernel = M3_AT_LEVEL(decode_vectors);
  const int64_t width = m3_book_code_bytes(&p->book);
  const int64_t bytes = p->tokens * p->book.dim * (p->dtype == M3_F32 ? 4 : 2);
  m3::parallel_for(p->records * p->heads, 64 / p->tokens + 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t slot = p->slot[task / p->heads], head = task % p->heads;
      char* out = static_cast<char*>(p->out) + task * bytes;
      if (slot < 0)
        std::memset(out, 0, static_cast<size_t>(bytes));
      else
        kernel(p->book, p->codes + slot * p->code_stride[0] + head * p->code_stride[1], width, p->tokens, out,
               p->dtype);
    }
  });
  return M3_OK;
}
