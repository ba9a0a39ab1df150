/* The codebooks of one side (keys or values) of the coded memory format, and the sizes of their codes.
 *
 * A code is ceil(2b / 8) bytes with two coarse indices of b bits, then ceil(M n / 8) bytes with M fine indices of n
 * bits, every index lowest bit first; x = rot^T ([coarse[0][i0]; coarse[1][i1]] + [fine[0][j0]; ...]). */
#ifndef M3_BOOK_H
#define M3_BOOK_H

#include "m3/api.h"

#define M3_BOOK_MAX_DIM 1024
#define M3_BOOK_MIN_BITS 4
#define M3_BOOK_MAX_BITS 14

typedef struct M3Book {
  int64_t dim;         /* D, a multiple of 8 up to M3_BOOK_MAX_DIM */
  int64_t coarse_bits; /* b */
  int64_t fine_parts;  /* M, divides D */
  int64_t fine_bits;   /* n */
  m3_dtype dtype;      /* of both tables: M3_F32 or M3_F16 */
  const void* coarse;  /* [2, 2^b, D/2] contiguous */
  const void* fine;    /* [M, 2^n, D/M] contiguous */
  const float* rot;    /* [D, D] contiguous; null: no rotation */
} M3Book;

static inline int64_t m3_book_coarse_bytes(const M3Book* book) { return (2 * book->coarse_bits + 7) / 8; }

/* Bytes of one vector's code. */
static inline int64_t m3_book_code_bytes(const M3Book* book) {
  return m3_book_coarse_bytes(book) + (book->fine_parts * book->fine_bits + 7) / 8;
}

/* G: bytes of the codes of one record head, padded to a multiple of 16. */
static inline int64_t m3_book_record_bytes(const M3Book* book, int64_t tokens) {
  return (tokens * m3_book_code_bytes(book) + 15) / 16 * 16;
}

#endif
