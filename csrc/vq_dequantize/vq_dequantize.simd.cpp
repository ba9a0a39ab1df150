// Blocks of kRows vectors: look the two coarse halves and the M fine pieces up, add them in float32, then multiply the
// block by rot ([kRows, D] x [D, D], in registers) and convert. Rows stay in a stack buffer of at most 16 KiB.
#include "m3/vq_dequantize.h"

#include "common/vec.h"

namespace m3 {
namespace M3_LEVEL {
namespace {

constexpr int64_t kRows = 4;
constexpr int64_t kPad = 16;  // floats a vector store may run over the end of a row
constexpr int64_t kMaxCode = (2 * M3_BOOK_MAX_BITS + 7) / 8 + (M3_BOOK_MAX_DIM * M3_BOOK_MAX_BITS + 7) / 8;

// A code in its own buffer, so that any index can be read as four bytes.
struct Code {
  uint8_t bytes[kMaxCode + 4];

  int64_t index(int64_t bit, int64_t bits) const {
    uint32_t word;
    memcpy(&word, bytes + bit / 8, 4);
#if __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
    word = __builtin_bswap32(word);
#endif
    return (word >> (bit % 8)) & ((1u << bits) - 1);
  }
};

// to[0..width) = table[at..at+width), whole vectors where the table does not end first: what runs over the piece is
// overwritten by the next one, or lies in the padding. Pieces are therefore written in ascending order.
template <class T>
inline void put(float* to, const T* table, int64_t at, int64_t width, int64_t total) {
  int64_t d = 0;
  if (at + (width + kLanes - 1) / kLanes * kLanes <= total) {
    for (; d < width; d += kLanes) store(to + d, load(table + at + d));
    return;
  }
  for (; d + kLanes <= width; d += kLanes) store(to + d, load(table + at + d));
  for (; d < width; ++d) to[d] = to_float(table[at + d]);
}

// [count, D] sums of coarse and fine parts, `pitch` floats apart.
template <class T>
void look_up(const M3Book& book, const uint8_t* codes, int64_t stride, int64_t count, float* rows, int64_t pitch) {
  const T* coarse = static_cast<const T*>(book.coarse);
  const T* fine = static_cast<const T*>(book.fine);
  const int64_t b = book.coarse_bits, n = book.fine_bits, half = book.dim / 2, width = book.dim / book.fine_parts;
  const int64_t first = 8 * m3_book_coarse_bytes(&book), bytes = m3_book_code_bytes(&book);
  const int64_t coarse_total = (2 << b) * half, fine_total = (book.fine_parts << n) * width;
  Code code;
  int64_t at[kRows][2];
  // The coarse tables (5 MB in the paper's shape) lie outside L1: ask for every row's entries before using the first.
  for (int64_t r = 0; r < count; ++r) {
    memcpy(code.bytes, codes + r * stride, 4 < bytes ? 4 : bytes);
    for (int64_t i = 0; i < 2; ++i) {
      at[r][i] = ((i << b) + code.index(i * b, b)) * half;
      const char* entry = reinterpret_cast<const char*>(coarse + at[r][i]);
      for (int64_t line = 0; line < half * static_cast<int64_t>(sizeof(T)); line += 64)
        __builtin_prefetch(entry + line);
    }
  }
  for (int64_t r = 0; r < count; ++r) {
    float* row = rows + r * pitch;
    memcpy(code.bytes, codes + r * stride, bytes);
    float sum[M3_BOOK_MAX_DIM + kPad];
    for (int64_t m = 0; m < book.fine_parts; ++m)
      put(sum + m * width, fine, ((m << n) + code.index(first + m * n, n)) * width, width, fine_total);
    for (int64_t i = 0; i < 2; ++i) put(row + i * half, coarse, at[r][i], half, coarse_total);
    int64_t d = 0;
    for (; d + kLanes <= book.dim; d += kLanes) store(row + d, load(row + d) + load(sum + d));
    for (; d < book.dim; ++d) row[d] += sum[d];
  }
}

// Columns [d, d + kVecs * kLanes) of rows @ rot.
template <int kVecs, class Out>
inline void rotate_columns(const M3Book& book, const float* rows, int64_t pitch, int64_t count, int64_t d, Out* out) {
  F32 sum[kRows][kVecs] = {};
  for (int64_t e = 0; e < book.dim; ++e) {
    const float* line = book.rot + e * book.dim + d;
    F32 r[kVecs];
    for (int i = 0; i < kVecs; ++i) r[i] = load(line + i * kLanes);
    for (int64_t row = 0; row < kRows; ++row)
      for (int i = 0; i < kVecs; ++i) sum[row][i] += rows[row * pitch + e] * r[i];
  }
  for (int64_t row = 0; row < count; ++row)
    for (int i = 0; i < kVecs; ++i) store(out + row * book.dim + d + i * kLanes, sum[row][i]);
}

template <class Out>
void rotate(const M3Book& book, const float* rows, int64_t pitch, int64_t count, Out* out) {
  int64_t d = 0;
  for (; d + 2 * kLanes <= book.dim; d += 2 * kLanes) rotate_columns<2>(book, rows, pitch, count, d, out);
  for (; d + kLanes <= book.dim; d += kLanes) rotate_columns<1>(book, rows, pitch, count, d, out);
  if (d < book.dim && book.dim >= kLanes) {  // the last vector again, overlapping: the same values
    rotate_columns<1>(book, rows, pitch, count, book.dim - kLanes, out);
    return;
  }
  for (; d < book.dim; ++d)
    for (int64_t row = 0; row < count; ++row) {
      float sum = 0.f;
      for (int64_t e = 0; e < book.dim; ++e) sum += rows[row * pitch + e] * book.rot[e * book.dim + d];
      from_float(sum, out + row * book.dim + d);
    }
}

template <class Out>
void convert(const M3Book& book, const float* rows, int64_t pitch, int64_t count, Out* out) {
  for (int64_t row = 0; row < count; ++row) {
    int64_t d = 0;
    for (; d + kLanes <= book.dim; d += kLanes) store(out + row * book.dim + d, load(rows + row * pitch + d));
    for (; d < book.dim; ++d) from_float(rows[row * pitch + d], out + row * book.dim + d);
  }
}

}  // namespace

void decode_vectors(const M3Book& book, const uint8_t* codes, int64_t stride, int64_t count, void* out,
                    m3_dtype dtype) {
  float rows[kRows * (M3_BOOK_MAX_DIM + kPad)];
  const int64_t pitch = book.dim + kPad;
  for (int64_t i = 0; i < kRows * pitch; ++i) rows[i] = 0.f;  // the last block may have fewer rows
  with_dtype(dtype, [&](auto tag) {
    using Out = decltype(tag);
    for (int64_t at = 0; at < count; at += kRows) {
      const int64_t block = count - at < kRows ? count - at : kRows;
      if (book.dtype == M3_F16)
        look_up<F16>(book, codes + at * stride, stride, block, rows, pitch);
      else
        look_up<float>(book, codes + at * stride, stride, block, rows, pitch);
      Out* to = static_cast<Out*>(out) + at * book.dim;
      if (book.rot != nullptr)
        rotate(book, rows, pitch, block, to);
      else
        convert(book, rows, pitch, block, to);
    }
  });
}

}  // namespace M3_LEVEL
}  // namespace m3
