// One task per (record, head), whose K codes lie back to back. The decoder of vq_dequantize gets many of them in one
// call, so that it can ask for table entries of the next ones while it works on one.
#include "m3/gather_dequantize.h"

#include <cstring>
#include <type_traits>

#include "common/codec.h"
#include "common/parallel.h"

static_assert(std::is_trivially_copyable_v<M3GatherDequantizeParams> &&
              std::is_standard_layout_v<M3GatherDequantizeParams>);

namespace {
constexpr int64_t kRuns = 512;  // heads of records decoded in one call: their addresses lie on the stack
}

m3_status m3_gather_dequantize_cpu(const M3GatherDequantizeParams* p) {
  M3_CHECK(p->slots >= 0 && p->heads >= 0 && p->records >= 0 && p->tokens > 0, "gather_dequantize: negative size");
  if (const m3_status status = m3::check_book(p->book)) return status;
  for (int64_t r = 0; r < p->records; ++r)
    M3_CHECK(p->slot[r] >= -1 && p->slot[r] < p->slots, "slots[%lld]: expected -1..%lld, got %d",
             static_cast<long long>(r), static_cast<long long>(p->slots - 1), p->slot[r]);
  const auto kernel = M3_AT_LEVEL(decode_runs);
  const int64_t width = m3_book_code_bytes(&p->book);
  const int64_t bytes = p->tokens * p->book.dim * (p->dtype == M3_F32 ? 4 : 2);
  m3::parallel_for(p->records * p->heads, 64 / p->tokens + 1, [&](int64_t begin, int64_t end) {
    const uint8_t* runs[kRuns];
    for (int64_t task = begin; task < end;) {
      char* out = static_cast<char*>(p->out) + task * bytes;
      int64_t count = 0;
      for (; task < end && count < kRuns && p->slot[task / p->heads] >= 0; ++task)
        runs[count++] = p->codes + p->slot[task / p->heads] * p->code_stride[0] + task % p->heads * p->code_stride[1];
      if (count > 0) {
        kernel(p->book, runs, p->tokens, width, count * p->tokens, out, p->dtype);
      } else {
        std::memset(out, 0, static_cast<size_t>(bytes));
        ++task;
      }
    }
  });
  return M3_OK;
}
