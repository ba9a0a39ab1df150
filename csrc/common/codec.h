// Decoding shared by the launchers of vq_dequantize and gather_dequantize.
#pragma once

#include "common/check.h"
#include "common/simd.h"
#include "m3/book.h"

// Decodes `count` codes, in runs of `per_run` codes `stride` bytes apart, into rows [count, D] of `dtype`. The last run
// may be shorter.
M3_DECLARE_LEVELS(void, decode_runs, const M3Book& book, const uint8_t* const* runs, int64_t per_run, int64_t stride,
                  int64_t count, void* out, m3_dtype dtype)

// Decodes `count` codes, `stride` bytes apart, into rows [count, D] of `dtype`.
M3_DECLARE_LEVELS(void, decode_vectors, const M3Book& book, const uint8_t* codes, int64_t stride, int64_t count,
                  void* out, m3_dtype dtype)

namespace m3 {

// M3_OK, or the reason why `book` cannot be decoded.
inline m3_status check_book(const M3Book& book) {
  M3_CHECK(book.dim >= 8 && book.dim % 8 == 0 && book.dim <= M3_BOOK_MAX_DIM,
           "book: expected a dimension that is a multiple of 8 up to %d, got %lld", M3_BOOK_MAX_DIM,
           static_cast<long long>(book.dim));
  M3_CHECK(book.coarse_bits >= M3_BOOK_MIN_BITS && book.coarse_bits <= M3_BOOK_MAX_BITS &&
               book.fine_bits >= M3_BOOK_MIN_BITS && book.fine_bits <= M3_BOOK_MAX_BITS,
           "book: expected %d to %d bits, got %lld coarse and %lld fine", M3_BOOK_MIN_BITS, M3_BOOK_MAX_BITS,
           static_cast<long long>(book.coarse_bits), static_cast<long long>(book.fine_bits));
  M3_CHECK(book.fine_parts > 0 && book.dim % book.fine_parts == 0,
           "book: expected a number of fine pieces that divides %lld, got %lld", static_cast<long long>(book.dim),
           static_cast<long long>(book.fine_parts));
  M3_CHECK(book.dtype == M3_F32 || book.dtype == M3_F16, "book: expected float32 or float16 tables");
  return M3_OK;
}

}  // namespace m3
