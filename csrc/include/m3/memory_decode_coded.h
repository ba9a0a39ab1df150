/* memory_decode_coded: memory_decode with records in the coded format, read without decoding them to memory. */
#ifndef M3_MEMORY_DECODE_CODED_H
#define M3_MEMORY_DECODE_CODED_H

#include "m3/book.h"
#include "m3/memory_decode.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct M3MemoryDecodeCodedParams {
  M3MemoryDecodeParams decode; /* memory.k and memory.v are null */
  const uint8_t* k_codes;      /* [S, Hm, m3_book_record_bytes(&k_book, K)], last stride 1 */
  const uint8_t* v_codes;
  int64_t k_code_stride[2], v_code_stride[2]; /* of S, Hm, in bytes */
  M3Book k_book, v_book;                      /* of dimension D */
} M3MemoryDecodeCodedParams;

M3_API m3_status m3_memory_decode_coded_cpu(const M3MemoryDecodeCodedParams* params);

#ifdef __cplusplus
}
#endif
#endif
