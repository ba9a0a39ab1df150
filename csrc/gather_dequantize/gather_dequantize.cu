#include "m3/cuda.h"
#include "vq_dequantize/dequantize.cuh"

extern "C" m3_status m3_gather_dequantize_cuda(const M3GatherDequantizeParams* p, void* stream) {
  const int64_t bytes = m3_book_code_bytes(&p->book);
  const uint64_t places = reinterpret_cast<uintptr_t>(p->codes) | static_cast<uint64_t>(p->code_stride[0]) |
                          static_cast<uint64_t>(p->code_stride[1]) | static_cast<uint64_t>(p->tokens * bytes);
  const m3::gpu::CodeSource source{p->codes, p->slot, p->records * p->heads * p->tokens, p->slots, p->heads, p->tokens,
                                   {p->code_stride[0], p->code_stride[1], bytes}, places % 16 == 0};
  return m3::gpu::dequantize<true>(source, p->book, p->dtype, p->out, stream);
}
