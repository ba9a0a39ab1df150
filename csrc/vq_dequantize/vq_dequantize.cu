#include "m3/cuda.h"
#include "vq_dequantize/dequantize.cuh"

extern "C" m3_status m3_vq_dequantize_cuda(const M3VqDequantizeParams* p, void* stream) {
  m3::gpu::CodeSource source{};
  source.codes = p->codes, source.vectors = p->vectors, source.tokens = p->vectors;
  source.stride[2] = p->code_stride;
  source.wide = reinterpret_cast<uintptr_t>(p->codes) % 16 == 0 && p->code_stride == m3_book_code_bytes(&p->book);
  return m3::gpu::dequantize<false>(source, p->book, p->dtype, p->out, stream);
}
