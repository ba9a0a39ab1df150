#include "m3/vq_dequantize.h"

#include <type_traits>

#include "common/codec.h"
#include "common/parallel.h"

static_assert(std::is_trivially_copyable_v<M3VqDequantizeParams> && std::is_standard_layout_v<M3VqDequantizeParams>);

m3_status m3_vq_dequantize_cpu(const M3VqDequantizeParams* p) {
  M3_CHECK(p->vectors >= 0, "vq_dequantize: negative number of vectors");
  if (const m3_status status = m3::check_book(p->book)) return status;
  const auto kernel = M3_AT_LEVEL(decode_vectors);
  const int64_t row_bytes = p->book.dim * (p->dtype == M3_F32 ? 4 : 2);
  // 64 vectors are some 10 microseconds of work; a multiple of the kernel's block of rows.
  m3::parallel_for(p->vectors, 64, [&](int64_t begin, int64_t end) {
    kernel(p->book, p->codes + begin * p->code_stride, p->code_stride, end - begin,
           static_cast<char*>(p->out) + begin * row_bytes, p->dtype);
  });
  return M3_OK;
}
