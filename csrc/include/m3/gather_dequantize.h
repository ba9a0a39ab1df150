/* gather_dequantize: the records of some slots of a coded arena, as vectors; zeros where the slot is -1. */
#ifndef M3_GATHER_DEQUANTIZE_H
#define M3_GATHER_DEQUANTIZE_H

#include "m3/api.h"
#include "m3/book.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct M3GatherDequantizeParams {
  int64_t slots, heads, records, tokens; /* S, Hm, R, K */
  M3Book book;
  m3_dtype dtype;         /* of out */
  const uint8_t* codes;   /* [S, Hm, m3_book_record_bytes(&book, K)], last stride 1 */
  const int32_t* slot;    /* [R] contiguous, -1..S-1 */
  void* out;              /* [R, Hm, K, D] contiguous */
  int64_t code_stride[2]; /* of S, Hm, in bytes */
} M3GatherDequantizeParams;

M3_API m3_status m3_gather_dequantize_cpu(const M3GatherDequantizeParams* params);

#ifdef __cplusplus
}
#endif
#endif
