// Small matrix products on stack tiles, for `*.simd.cpp` files: C[m, n] (+)= A[m, depth] B[depth, n], A float with any
// strides (broadcast from memory), B's rows float or a narrower type converted as it is loaded.
#pragma once

#include "common/vec.h"

namespace m3 {
namespace M3_LEVEL {
namespace {

// Registers of one step: kRowStep x kColStep accumulators, kColStep vectors of B.
constexpr int kRowStep = kLanes == 16 ? 6 : 4;
constexpr int kColStep = kLanes == 16 ? 4 : 2;

struct Strided {  // A[i, d] at p[i * row + d * col]
  const float* p;
  int64_t row, col;
};

template <class T>
struct Rows {  // B with rows at equal distances
  typedef T element;
  const T* p;
  int64_t stride;
  const T* row(int d) const { return p + d * stride; }
};

template <class T>
struct RowPointers {  // B with rows anywhere
  typedef T element;
  const T* const* rows;
  const T* row(int d) const { return rows[d]; }
};

template <int M, int N, bool Half, class B>
inline void gemm_step(const Strided& a, const B& b, int depth, int column, float* c, int64_t ldc, bool add) {
  F32 acc[M][N];
#pragma GCC unroll 8
  for (int i = 0; i < M; ++i)
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) acc[i][n] = add ? load(c + i * ldc + n * kLanes) : F32{};
  for (int d = 0; d < depth; ++d) {
    const auto* row = b.row(d) + column;
    F32 x[N];
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) x[n] = Half ? load_half(row + n * kLanes) : load(row + n * kLanes);
#pragma GCC unroll 8
    for (int i = 0; i < M; ++i) {
      const F32 y = splat(a.p[i * a.row + d * a.col]);
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) acc[i][n] += y * x[n];
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < M; ++i)
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) store(c + i * ldc + n * kLanes, acc[i][n]);
}

template <int M, class B>
inline void gemm_rows(const Strided& a, const B& b, int depth, int n, float* c, int64_t ldc, bool add) {
  int j = 0;
  for (; j + kColStep * kLanes <= n; j += kColStep * kLanes)
    gemm_step<M, kColStep, false>(a, b, depth, j, c + j, ldc, add);
  for (; j + kLanes <= n; j += kLanes) gemm_step<M, 1, false>(a, b, depth, j, c + j, ldc, add);
  if (j < n) gemm_step<M, 1, true>(a, b, depth, j, c + j, ldc, add);
}

// n is a multiple of kLanes, or of kLanes / 2 (rows of B are then read to n and no further; C is written up to the
// next multiple of kLanes).
template <class B>
inline void gemm(Strided a, const B& b, int m, int n, int depth, float* c, int64_t ldc, bool add) {
  int i = 0;
  for (; i + kRowStep <= m; i += kRowStep) {
    gemm_rows<kRowStep>(a, b, depth, n, c + i * ldc, ldc, add);
    a.p += kRowStep * a.row;
  }
  c += i * ldc;
  switch (m - i) {
    case 5: return gemm_rows<5>(a, b, depth, n, c, ldc, add);
    case 4: return gemm_rows<4>(a, b, depth, n, c, ldc, add);
    case 3: return gemm_rows<3>(a, b, depth, n, c, ldc, add);
    case 2: return gemm_rows<2>(a, b, depth, n, c, ldc, add);
    case 1: return gemm_rows<1>(a, b, depth, n, c, ldc, add);
    default: return;
  }
}

// C[i, j] = A[i] . row j, for few rows of A (rows padded with zeros to a multiple of kLanes) and rows of `dim` elements
// at `rows[0..count)`. C is written up to the next multiple of kLanes.
template <int M, class T>
inline void dot_step(const float* a, int64_t lda, const T* const* rows, int count, int dim, float* c, int64_t ldc) {
  for (int j = 0; j < count; j += kLanes) {
    F32 part[M][kLanes];
    for (int jj = 0; jj < kLanes; ++jj) {
      const T* row = rows[j + jj < count ? j + jj : count - 1];
      F32 acc[M] = {};
      int d = 0;
      for (; d + kLanes <= dim; d += kLanes) {
        const F32 x = load(row + d);
#pragma GCC unroll 8
        for (int i = 0; i < M; ++i) acc[i] += load(a + i * lda + d) * x;
      }
      if (d < dim) {
        const F32 x = load_half(row + d);
#pragma GCC unroll 8
        for (int i = 0; i < M; ++i) acc[i] += load(a + i * lda + d) * x;
      }
#pragma GCC unroll 8
      for (int i = 0; i < M; ++i) part[i][jj] = acc[i];
    }
#pragma GCC unroll 8
    for (int i = 0; i < M; ++i) store(c + i * ldc + j, sum_each(part[i]));
  }
}

template <class T>
inline void dot(const float* a, int64_t lda, int m, const T* const* rows, int count, int dim, float* c, int64_t ldc) {
  int i = 0;
  for (; i + 4 <= m; i += 4) dot_step<4>(a + i * lda, lda, rows, count, dim, c + i * ldc, ldc);
  a += i * lda, c += i * ldc;
  if (m - i == 3) dot_step<3>(a, lda, rows, count, dim, c, ldc);
  if (m - i == 2) dot_step<2>(a, lda, rows, count, dim, c, ldc);
  if (m - i == 1) dot_step<1>(a, lda, rows, count, dim, c, ldc);
}

// out[d, j] = rows[j][d] as float: `count` rows of `dim` elements become columns. Columns up to the next multiple of
// kLanes are written (copies of the last row).
template <class T>
inline void pack_columns(const T* const* rows, int count, int dim, float* out, int64_t ldo) {
  for (int j = 0; j < count; j += kLanes)
    for (int d = 0; d < dim; d += kLanes) {
      const bool half = d + kLanes > dim;
      F32 v[kLanes];
      for (int jj = 0; jj < kLanes; ++jj) {
        const T* p = rows[j + jj < count ? j + jj : count - 1] + d;
        v[jj] = half ? load_half(p) : load(p);
      }
      transpose(v);
      const int height = half ? dim - d : kLanes;
      for (int dd = 0; dd < height; ++dd) store(out + (d + dd) * ldo + j, v[dd]);
    }
}

// out[j, d] = factor * rows[j][d] as float; rows are padded with zeros to a multiple of kLanes.
template <class T>
inline void pack_row(const T* row, int dim, float factor, float* out) {
  int d = 0;
  for (; d + kLanes <= dim; d += kLanes) store(out + d, load(row + d) * factor);
  if (d < dim) store(out + d, load_half(row + d) * factor);
}

// The opposite: `dim` floats times a factor into a row of T.
template <class T>
inline void unpack_row(const float* in, int dim, float factor, T* row) {
  int d = 0;
  for (; d + kLanes <= dim; d += kLanes) store(row + d, load(in + d) * factor);
  if (d < dim) store_half(row + d, load(in + d) * factor);
}

}  // namespace
}  // namespace M3_LEVEL
}  // namespace m3
