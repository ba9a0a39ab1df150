/* vq_dequantize: vectors from their codes (m3/book.h has the format). */
#ifndef M3_VQ_DEQUANTIZE_H
#define M3_VQ_DEQUANTIZE_H

#include "m3/api.h"
#include "m3/book.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct M3VqDequantizeParams {
  int64_t vectors;
  M3Book book;
  m3_dtype dtype;       /* of out */
  const uint8_t* codes; /* [vectors, m3_book_code_bytes(&book)], last stride 1 */
  void* out;            /* [vectors, D] contiguous */
  int64_t code_stride;  /* bytes from one code to the next */
} M3VqDequantizeParams;

M3_API m3_status m3_vq_dequantize_cpu(const M3VqDequantizeParams* params);

#ifdef __cplusplus
}
#endif
#endif
