// Products of floats with rows of bf16 that are taken apart into even and odd elements, for `*.simd.cpp` files: a shift
// and a mask make two vectors of floats from one of bf16, where widening half of it at a time takes twice as many
// instructions. For levels without products of bf16 pairs, and few rows of floats.
#pragma once

#include "common/pair_tile.h"

namespace m3 {
namespace M3_LEVEL {
namespace {

template <int Odd, int... I>
inline F32 every_other(F32 a, F32 b, Lanes<I...>) {
  return __builtin_shufflevector(a, b, (2 * I + Odd)...);
}
template <int Half, int... I>
inline F32 in_turn(F32 even, F32 odd, Lanes<I...>) {
  return __builtin_shufflevector(even, odd, (Half * kLanes / 2 + I / 2 + I % 2 * kLanes)...);
}

// Two vectors side by side: even elements into the first, odd ones into the second; and back.
inline void take_apart(const float* from, F32* even, F32* odd) {
  typedef typename MakeLanes<kLanes>::type All;
  const F32 a = load(from), b = load(from + kLanes);
  *even = every_other<0>(a, b, All{}), *odd = every_other<1>(a, b, All{});
}
inline void put_together(F32 even, F32 odd, float* to) {
  typedef typename MakeLanes<kLanes>::type All;
  store(to, in_turn<0>(even, odd, All{}));
  store(to + kLanes, in_turn<1>(even, odd, All{}));
}

template <bool Part>
inline U32 load_some(const BF16* p, int n) {
  return Part ? load_pairs_part(p, n) : load_pairs(p);
}

// For the kPairRow elements from d on (Part: n of them): sums of M rows of `a`, taken apart, with two rows of B.
template <int M, bool Part>
inline void split_dot(const float* a, int64_t lda, const BF16* b, const BF16* c, int n, F32* with_b, F32* with_c) {
  const U32 x = load_some<Part>(b, n), y = load_some<Part>(c, n);
  const F32 x_even = low(x), x_odd = high(x), y_even = low(y), y_odd = high(y);
#pragma GCC unroll 4
  for (int i = 0; i < M; ++i) {
    F32 even = load(a + i * lda), odd = load(a + i * lda + kLanes);
    M3_OPAQUE(even);
    M3_OPAQUE(odd);
    with_b[i] += even * x_even;
    with_c[i] += even * y_even;
    with_b[i] += odd * x_odd;
    with_c[i] += odd * y_odd;
  }
}

// c[i, j] = a_i . row j; rows of A taken apart, with zeros up to pair_padded(dim). C is written up to the next multiple
// of kLanes. step(n): as in pair_tile.h.
template <int M, class Row, class Step>
inline void split_dot_rows(const float* a, int64_t lda, const Row& row, int count, int dim, float* c, int64_t ldc,
                           Step& step) {
  const int lines = (dim * 2 + 63) / 64;
  for (int j = 0; j < count; j += kLanes) {
    F32 part[M][kLanes];
    for (int n = 0; n < kLanes; n += 2) {
      const int last = count - 1, at = j + n < last ? j + n : last;
      const BF16 *first = row(at), *second = row(at < last ? at + 1 : last);
      F32 sums[2][M] = {};
      int d = 0;
      for (; d + kPairRow <= dim; d += kPairRow)
        split_dot<M, false>(a + d, lda, first + d, second + d, 0, sums[0], sums[1]);
      if (d < dim) split_dot<M, true>(a + d, lda, first + d, second + d, dim - d, sums[0], sums[1]);
#pragma GCC unroll 4
      for (int i = 0; i < M; ++i) part[i][n] = sums[0][i], part[i][n + 1] = sums[1][i];
      step(2 * lines);
    }
#pragma GCC unroll 4
    for (int i = 0; i < M; ++i) store(c + i * ldc + j, sum_each(part[i]));
  }
}

// c[i] += sum over j of a[i, j] row j, for Vecs x kPairRow columns (Part: n of them).
template <int M, int Vecs, bool Part, class Row, class Step>
inline void split_add(const float* a, int64_t lda, const Row& row, int count, int d, int n, float* c, int64_t ldc,
                      Step& step) {
  constexpr int kBytes = Vecs * static_cast<int>(sizeof(U32));  // of a row
  F32 even[M][Vecs], odd[M][Vecs];
#pragma GCC unroll 4
  for (int i = 0; i < M; ++i)
#pragma GCC unroll 2
    for (int v = 0; v < Vecs; ++v) take_apart(c + i * ldc + d + v * kPairRow, &even[i][v], &odd[i][v]);
  for (int j = 0; j < count; ++j) {
    const BF16* b = row(j) + d;
#pragma GCC unroll 2
    for (int v = 0; v < Vecs; ++v) {
      const U32 x = load_some<Part>(b + v * kPairRow, n);
      const F32 x_even = low(x), x_odd = high(x);
#pragma GCC unroll 4
      for (int i = 0; i < M; ++i) {
        const F32 y = splat(a[i * lda + j]);
        even[i][v] += y * x_even;
        odd[i][v] += y * x_odd;
      }
    }
    if (j * kBytes % 64 == 0) step(kBytes < 64 ? 1 : kBytes / 64);
  }
#pragma GCC unroll 4
  for (int i = 0; i < M; ++i)
#pragma GCC unroll 2
    for (int v = 0; v < Vecs; ++v) put_together(even[i][v], odd[i][v], c + i * ldc + d + v * kPairRow);
}

// c[i, 0..dim) += a[i, 0..count) times the rows of B. Rows of C have pair_padded(dim) elements.
template <int M, class Row, class Step>
inline void split_add_rows(const float* a, int64_t lda, const Row& row, int count, int dim, float* c, int64_t ldc,
                           Step& step) {
  constexpr int kVecs = M < 3 || kLanes == 16 ? 2 : 1;  // 2 x 2 x M sums, of 16 registers or 32
  int d = 0;
  for (; d + kVecs * kPairRow <= dim; d += kVecs * kPairRow)
    split_add<M, kVecs, false>(a, lda, row, count, d, 0, c, ldc, step);
  if (kVecs == 2 && d + kPairRow <= dim) {
    split_add<M, 1, false>(a, lda, row, count, d, 0, c, ldc, step);
    d += kPairRow;
  }
  if (d < dim) split_add<M, 1, true>(a, lda, row, count, d, dim - d, c, ldc, step);
}

}  // namespace
}  // namespace M3_LEVEL
}  // namespace m3
