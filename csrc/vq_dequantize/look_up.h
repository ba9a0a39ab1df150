// Sums of table entries: one vector in the coded basis, for `*.simd.cpp` files.
#pragma once

#include "m3/book.h"

#include "common/vec.h"

namespace m3 {
namespace M3_LEVEL {
namespace {

// ---- shapes known at compile time ----------------------------------------------------------------------------------

// Lanes from First on of `b`, those before of `a`.
template <int First, int... I>
inline F32 join(F32 a, F32 b, Lanes<I...>) {
  return __builtin_shufflevector(a, b, (I < First ? I : I + kLanes)...);
}

// kLanes values of a row that is pieces of kWidth elements end to end, from element kAt on. Piece m begins at
// table + at[m]. Whole vectors are read where only some lanes are wanted. They stay inside the table: a vector that
// begins before its piece or ends behind it belongs to a row with a piece before or behind, whose entries (16 or more)
// lie there.
template <int kWidth, int kAt, int kPiece = kAt / kWidth, class T>
inline F32 row_vector(const T* table, const uint32_t* at, F32 before = F32{}) {
  constexpr int kFirst = kPiece * kWidth - kAt;  // lane of the piece's first element
  const char* from = reinterpret_cast<const char*>(table) + (static_cast<int64_t>(at[kPiece]) - kFirst) * sizeof(T);
  F32 row = load(reinterpret_cast<const T*>(from));
  if constexpr (kFirst > 0) row = join<kFirst>(before, row, typename MakeLanes<kLanes>::type{});
  if constexpr (kFirst + kWidth < kLanes)
    return row_vector<kWidth, kAt, kPiece + 1>(table, at, row);
  else
    return row;
}

// Elements kAt.. of a vector in the coded basis. kDim is a multiple of kLanes.
template <int kDim, int kParts, int kAt, class T>
inline F32 look_up_lanes(const T* coarse, const T* fine, const uint32_t* at) {
  return row_vector<kDim / 2, kAt>(coarse, at) + row_vector<kDim / kParts, kAt>(fine, at + 2);
}

template <int kDim, int kParts, int kAt = 0, class T, class Out>
inline void look_up_fixed(const T* coarse, const T* fine, const uint32_t* at, Out* row) {
  store(row + kAt, look_up_lanes<kDim, kParts, kAt>(coarse, fine, at));
  if constexpr (kAt + kLanes < kDim) look_up_fixed<kDim, kParts, kAt + kLanes>(coarse, fine, at, row);
}

// ---- any shape -----------------------------------------------------------------------------------------------------

constexpr int64_t kPad = 16;  // floats a vector store may run over the end of a row

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

template <class T, class Out>
void look_up_any(const M3Book& book, const uint32_t* at, Out* row) {
  const int64_t half = book.dim / 2, width = book.dim / book.fine_parts;
  const int64_t coarse_total = (2 << book.coarse_bits) * half, fine_total = (book.fine_parts << book.fine_bits) * width;
  float whole[M3_BOOK_MAX_DIM + kPad], sum[M3_BOOK_MAX_DIM + kPad];
  for (int64_t i = 0; i < 2; ++i) put(whole + i * half, static_cast<const T*>(book.coarse), at[i], half, coarse_total);
  for (int64_t m = 0; m < book.fine_parts; ++m)
    put(sum + m * width, static_cast<const T*>(book.fine), at[2 + m], width, fine_total);
  int64_t d = 0;
  for (; d + kLanes <= book.dim; d += kLanes) store(row + d, load(whole + d) + load(sum + d));
  for (; d < book.dim; ++d) from_float(whole[d] + sum[d], row + d);
}

}  // namespace
}  // namespace M3_LEVEL
}  // namespace m3
