// Products of bf16 operands two elements at a time, for `*.simd.cpp` files: a U32 lane holds two neighbours of a row
// (or of two rows), products are exact and sums are fp32. Worth it where the level has an instruction for it.
#pragma once

#include "common/vec.h"

namespace m3 {
namespace M3_LEVEL {
namespace {

#if defined(__AVX512BF16__)
constexpr bool kPairDots = true;
#else
constexpr bool kPairDots = false;
#endif

template <class T>
constexpr bool kPaired = false;
template <>
constexpr bool kPaired<BF16> = kPairDots;

constexpr int kPairRow = 2 * kLanes;  // elements of one vector of pairs

inline int pair_padded(int dim) { return (dim + kPairRow - 1) / kPairRow * kPairRow; }

inline U32 splat_pair(uint32_t pair) { return pair - U32{}; }

// The first n < kPairRow elements, zeros behind them.
inline U32 load_pairs_part(const BF16* p, int n) {
#if defined(__AVX512BW__)
  return reinterpret_cast<U32>(_mm512_maskz_loadu_epi16((1u << n) - 1u, p));
#else
  U32 v = {};
  memcpy(&v, p, sizeof(BF16) * n);
  return v;
#endif
}

// Element d of two rows side by side: lane d of `first` for the first kLanes elements, of `second` for the others.
typedef uint16_t Row16 __attribute__((vector_size(4 * kLanes)));
template <int Half, int... I>
inline U32 zip(Row16 a, Row16 b, Lanes<I...>) {
  return reinterpret_cast<U32>(__builtin_shufflevector(a, b, (Half * kLanes + I / 2 + I % 2 * 2 * kLanes)...));
}
inline void zip_rows(U32 a, U32 b, U32* first, U32* second) {
  typedef typename MakeLanes<2 * kLanes>::type All;
  *first = zip<0>(reinterpret_cast<Row16>(a), reinterpret_cast<Row16>(b), All{});
  *second = zip<1>(reinterpret_cast<Row16>(a), reinterpret_cast<Row16>(b), All{});
}

// A row of `dim` elements as pairs, zeros up to pair_padded(dim).
inline void copy_pairs(const BF16* row, int dim, uint32_t* out) {
  int d = 0;
  for (; d + kPairRow <= dim; d += kPairRow) memcpy(out + d / 2, row + d, sizeof(U32));
  if (d < dim) {
    const U32 last = load_pairs_part(row + d, dim - d);
    memcpy(out + d / 2, &last, sizeof last);
  }
}

// ---- many rows: C[m, n] = factor A B, or C += A B -----------------------------------------------------------------
// A[i, d]: pairs broadcast from memory; B[d, j]: rows of pairs. n is a multiple of kLanes.

template <int M, int N, bool Add>
inline void pair_step(const uint32_t* a, int64_t lda, const uint32_t* b, int64_t ldb, int depth, float factor, float* c,
                      int64_t ldc) {
  F32 acc[M][N];
#pragma GCC unroll 8
  for (int i = 0; i < M; ++i)
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) acc[i][n] = Add ? load(c + i * ldc + n * kLanes) : F32{};
  for (int d = 0; d < depth; ++d) {
    U32 x[N];
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) x[n] = load_pairs(b + d * ldb + n * kLanes);
#pragma GCC unroll 8
    for (int i = 0; i < M; ++i) {
      const U32 y = splat_pair(a[i * lda + d]);
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) acc[i][n] = dot_pairs(acc[i][n], y, x[n]);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < M; ++i)
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) store(c + i * ldc + n * kLanes, Add ? acc[i][n] : acc[i][n] * factor);
}

template <int M, bool Add>
inline void pair_rows(const uint32_t* a, int64_t lda, const uint32_t* b, int64_t ldb, int n, int depth, float factor,
                      float* c, int64_t ldc) {
  int j = 0;
  for (; j + 4 * kLanes <= n; j += 4 * kLanes) pair_step<M, 4, Add>(a, lda, b + j, ldb, depth, factor, c + j, ldc);
  for (; j + 2 * kLanes <= n; j += 2 * kLanes) pair_step<M, 2, Add>(a, lda, b + j, ldb, depth, factor, c + j, ldc);
  if (j < n) pair_step<M, 1, Add>(a, lda, b + j, ldb, depth, factor, c + j, ldc);
}

template <bool Add>
inline void pair_gemm(const uint32_t* a, int64_t lda, const uint32_t* b, int64_t ldb, int m, int n, int depth,
                      float factor, float* c, int64_t ldc) {
  int i = 0;
  for (; i + 6 <= m; i += 6) pair_rows<6, Add>(a + i * lda, lda, b, ldb, n, depth, factor, c + i * ldc, ldc);
  a += i * lda, c += i * ldc;
  switch (m - i) {
    case 5: return pair_rows<5, Add>(a, lda, b, ldb, n, depth, factor, c, ldc);
    case 4: return pair_rows<4, Add>(a, lda, b, ldb, n, depth, factor, c, ldc);
    case 3: return pair_rows<3, Add>(a, lda, b, ldb, n, depth, factor, c, ldc);
    case 2: return pair_rows<2, Add>(a, lda, b, ldb, n, depth, factor, c, ldc);
    case 1: return pair_rows<1, Add>(a, lda, b, ldb, n, depth, factor, c, ldc);
    default: return;
  }
}

// out[d, j] = pair d of row j, for d below half of pair_padded(dim): rows become columns, up to the next multiple of
// kLanes (copies of the last row).
inline void pack_pair_columns(const BF16* const* rows, int count, int dim, uint32_t* out, int64_t ldo) {
  for (int j = 0; j < count; j += kLanes)
    for (int d = 0; d < dim; d += kPairRow) {
      F32 v[kLanes];
      for (int jj = 0; jj < kLanes; ++jj) {
        const BF16* row = rows[j + jj < count ? j + jj : count - 1] + d;
        v[jj] = reinterpret_cast<F32>(d + kPairRow <= dim ? load_pairs(row) : load_pairs_part(row, dim - d));
      }
      transpose(v);
      for (int dd = 0; dd < kLanes; ++dd) memcpy(out + (d / 2 + dd) * ldo + j, &v[dd], sizeof(F32));
    }
}

// out[j, d] = element d of rows 2j and 2j + 1 (twice the last row where `count` is odd), for d below pair_padded(dim).
inline void pack_row_pairs(const BF16* const* rows, int count, int dim, uint32_t* out, int64_t ldo) {
  for (int j = 0; j < count; j += 2) {
    const BF16 *a = rows[j], *b = rows[j + 1 < count ? j + 1 : j];
    uint32_t* to = out + j / 2 * ldo;
    for (int d = 0; d < dim; d += kPairRow) {
      const bool whole = d + kPairRow <= dim;
      U32 first, second;
      zip_rows(whole ? load_pairs(a + d) : load_pairs_part(a + d, dim - d),
               whole ? load_pairs(b + d) : load_pairs_part(b + d, dim - d), &first, &second);
      memcpy(to + d, &first, sizeof first);
      memcpy(to + d + kLanes, &second, sizeof second);
    }
  }
}

// ---- few rows of A, B read once as it lies --------------------------------------------------------------------
// step(n): called for every n cache lines of B, for what should happen meanwhile. step.take(n, other): the same, but it
// may leave the fetching of n consecutive lines to the caller, or of `other`, which is at hand.

// c[i, j] = factor a_i . row j, with row(j) the rows of B. C is written up to the next multiple of kLanes. Flattened,
// since a call left in the loop sends the sums through memory.
template <int M, class Row, class Step>
__attribute__((flatten)) inline void pair_dot_rows(const uint32_t* a, int64_t lda, const Row& row, int count, int dim,
                                                   float factor, float* c, int64_t ldc, Step& step) {
  constexpr int kKeys = kLanes / (M > 2 ? 4 : M);  // M x kKeys sums fill one vector
  for (int j = 0; j < count; j += kKeys) {
    const BF16* b[kKeys];
#pragma GCC unroll 16
    for (int n = 0; n < kKeys; ++n) b[n] = row(j + n < count ? j + n : count - 1);
    F32 acc[kLanes] = {};
    const char* const ahead = step.take(kKeys * ((dim + kPairRow - 1) / kPairRow), a);
    const auto fetch = [&](int d) {
      if constexpr (Step::kFetches)
#pragma GCC unroll 16
        for (int n = 0; n < kKeys; ++n) __builtin_prefetch(ahead + (kKeys * d / kPairRow + n) * 64, 0, Step::kLocality);
    };
    int d = 0;
    for (; d + kPairRow <= dim; d += kPairRow) {
      fetch(d);
      U32 x[M];
#pragma GCC unroll 4
      for (int i = 0; i < M; ++i) x[i] = load_pairs(a + i * lda + d / 2);
#pragma GCC unroll 16
      for (int n = 0; n < kKeys; ++n) {
        const U32 y = load_pairs(b[n] + d);
#pragma GCC unroll 4
        for (int i = 0; i < M; ++i) acc[i * kKeys + n] = dot_pairs(acc[i * kKeys + n], x[i], y);
      }
    }
    if (d < dim) {
      fetch(d);
#pragma GCC unroll 16
      for (int n = 0; n < kKeys; ++n) {
        const U32 y = load_pairs_part(b[n] + d, dim - d);
#pragma GCC unroll 4
        for (int i = 0; i < M; ++i)
          acc[i * kKeys + n] = dot_pairs(acc[i * kKeys + n], load_pairs(a + i * lda + d / 2), y);
      }
    }
    float sums[kLanes];
    store(sums, sum_each(acc) * factor);
#pragma GCC unroll 4
    for (int i = 0; i < M; ++i) memcpy(c + i * ldc + j, sums + i * kKeys, sizeof(float) * kKeys);
  }
}

// c[i] += sum over pairs of rows of (weights of the pair) . (the pair), for `Lines` x kPairRow columns from d (Part:
// the last `rest` columns).
template <int M, int Lines, bool Part, class Row, class Step>
inline void pair_add_lines(const uint32_t* weights, int64_t ldw, const Row& row, int count, int d, int rest, float* c,
                           int64_t ldc, Step& step) {
  F32 acc[M][2 * Lines];
#pragma GCC unroll 4
  for (int i = 0; i < M; ++i)
#pragma GCC unroll 8
    for (int n = 0; n < 2 * Lines; ++n) acc[i][n] = load(c + i * ldc + d + n * kLanes);
  for (int j = 0; j < count; j += 2) {
    const BF16 *a = row(j) + d, *b = row(j + 1 < count ? j + 1 : j) + d;
    U32 x[2 * Lines];
#pragma GCC unroll 4
    for (int l = 0; l < Lines; ++l)
      zip_rows(Part ? load_pairs_part(a, rest) : load_pairs(a + l * kPairRow),
               Part ? load_pairs_part(b, rest) : load_pairs(b + l * kPairRow), &x[2 * l], &x[2 * l + 1]);
#pragma GCC unroll 4
    for (int i = 0; i < M; ++i) {
      const U32 y = splat_pair(weights[i * ldw + j / 2]);
#pragma GCC unroll 8
      for (int n = 0; n < 2 * Lines; ++n) acc[i][n] = dot_pairs(acc[i][n], y, x[n]);
    }
    step(2 * Lines);
  }
#pragma GCC unroll 4
  for (int i = 0; i < M; ++i)
#pragma GCC unroll 8
    for (int n = 0; n < 2 * Lines; ++n) store(c + i * ldc + d + n * kLanes, acc[i][n]);
}

template <int M, class Row, class Step>
inline void pair_add_rows(const uint32_t* weights, int64_t ldw, const Row& row, int count, int dim, float* c,
                          int64_t ldc, Step& step) {
  int d = 0;
  for (; d + 2 * kPairRow <= dim; d += 2 * kPairRow)
    pair_add_lines<M, 2, false>(weights, ldw, row, count, d, 0, c, ldc, step);
  if (d + kPairRow <= dim) {
    pair_add_lines<M, 1, false>(weights, ldw, row, count, d, 0, c, ldc, step);
    d += kPairRow;
  }
  if (d < dim) pair_add_lines<M, 1, true>(weights, ldw, row, count, d, dim - d, c, ldc, step);
}

// `take(tag)` in pieces of at most four of m rows: tag::value rows from row `i` on.
template <int N>
struct Count {
  static constexpr int value = N;
};
template <class Take>
inline void by_four(int m, const Take& take) {
  int i = 0;
  for (; i + 4 <= m; i += 4) take(Count<4>{}, i);
  if (m - i == 3) take(Count<3>{}, i);
  if (m - i == 2) take(Count<2>{}, i);
  if (m - i == 1) take(Count<1>{}, i);
}

}  // namespace
}  // namespace M3_LEVEL
}  // namespace m3
