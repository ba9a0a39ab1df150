// Online softmax on stack tiles, for `*.simd.cpp` files. A QueryTile holds up to kTileRows query vectors (the rows of a
// block times the query heads of a group); keys come in blocks of up to kBlock, so that every key and value is loaded
// and converted once for all query vectors that see it. After Milakov and Gimelshein, arXiv 1805.02867.
#pragma once

#include "common/gemm_tile.h"

namespace m3 {
namespace M3_LEVEL {
namespace {

constexpr int kMaxDim = 256;
constexpr int kBlock = 64;
constexpr int kTileRows = 64;
// Up to this many query vectors, scores are dot products with the rows as they lie; above it, transposing keys pays.
constexpr int kFewRows = 8;

inline int padded(int dim) { return (dim + kLanes - 1) / kLanes * kLanes; }

// Pointers to the key and value rows of one block.
template <class T>
struct KeyBlock {
  struct Run {
    int begin, end, record;
  };
  const T* k[kBlock];
  const T* v[kBlock];
  float bias[kBlock];
  Run runs[kBlock];  // which record the keys belong to; none for context
  int count, run_count;
  bool biased;

  void clear() { count = run_count = 0, biased = false; }
  int room() const { return kBlock - count; }

  // Appends n <= room() rows.
  void append(const T* keys, int64_t k_stride, const T* values, int64_t v_stride, int n) {
    for (int i = 0; i < n; ++i) k[count + i] = keys + i * k_stride, v[count + i] = values + i * v_stride;
    count += n;
  }
};

struct QueryTile {
  alignas(64) float q[kTileRows * kMaxDim];    // [m, ld], scaled, zeros behind dim
  alignas(64) float acc[kTileRows * kMaxDim];  // [m, ld], sum of exp(s - top) v
  alignas(64) float p[kTileRows * kBlock];
  float top[kTileRows], sum[kTileRows];
  float* mass[kTileRows];  // [refs] each: sum of exp(s - top) per record
  int m, dim, ld;
  int64_t refs;

  void begin(int rows, int width, int64_t records) {
    m = rows, dim = width, ld = padded(width), refs = records;
    memset(acc, 0, sizeof(float) * m * ld);
    for (int i = 0; i < m; ++i) top[i] = -kInf, sum[i] = 0.f;
  }
};

inline void scale_row(float* row, int64_t n, float factor) {
  int64_t d = 0;
  for (; d + kLanes <= n; d += kLanes) store(row + d, load(row + d) * factor);
  for (; d < n; ++d) row[d] *= factor;
}

// Sum of a run that starts and ends anywhere, in a fixed order.
inline float sum_run(const float* p, int n) {
  float total = 0.f;
  if (n >= kLanes) {
    F32 v = load(p);
    int i = kLanes;
    for (; i + kLanes <= n; i += kLanes) v += load(p + i);
    total = sum(v);
    p += i, n -= i;
  }
  float a = 0.f, b = 0.f;
  int i = 0;
  for (; i + 2 <= n; i += 2) a += p[i], b += p[i + 1];
  if (i < n) a += p[i];
  return total + (a + b);
}

// Bias and visibility: keys at or behind seen[i] (or `count` where seen is null) and the padding become -inf.
template <class T>
inline void mask_scores(const KeyBlock<T>& block, const int* seen, int m, float* p) {
  const int width = padded(block.count);
  if (block.biased)
    for (int i = 0; i < m; ++i)
      for (int j = 0; j < width; j += kLanes)  // bias behind count is stale, but hidden below
        store(p + i * kBlock + j, load(p + i * kBlock + j) + load(block.bias + j));
  for (int i = 0; i < m; ++i)
    for (int j = seen ? seen[i] : block.count; j < width; ++j) p[i * kBlock + j] = -kInf;
}

// Scores of a block, masked: tile.p[i, j] = q_i . k_j + bias_j. `columns` has room for dim x kBlock floats.
template <class T>
inline void scores(QueryTile& tile, const KeyBlock<T>& block, const int* seen, float* columns) {
  if (tile.m <= kFewRows) {
    dot(tile.q, tile.ld, tile.m, block.k, block.count, tile.dim, tile.p, kBlock);
  } else {
    pack_columns(block.k, block.count, tile.dim, columns, kBlock);
    gemm(Strided{tile.q, tile.ld, 1}, Rows<float>{columns, kBlock}, tile.m, padded(block.count), tile.dim, tile.p,
         kBlock, false);
  }
  mask_scores(block, seen, tile.m, tile.p);
}

// Takes a block into the running softmax: row i sees its first seen[i] keys (all of them where seen is null).
template <class T>
inline void consume(QueryTile& tile, const KeyBlock<T>& block, const int* seen) {
  alignas(64) float scratch[kMaxDim * kBlock];
  if (block.count == 0) return;
  scores(tile, block, seen, scratch);
  const int width = padded(block.count);
  for (int i = 0; i < tile.m; ++i) {
    float* p = tile.p + i * kBlock;
    F32 high = load(p);
    for (int j = kLanes; j < width; j += kLanes) high = max(high, load(p + j));
    const float before = tile.top[i], best = max(high), top = best > before ? best : before;
    if (top == -kInf) {
      memset(p, 0, sizeof(float) * width);
      continue;
    }
    F32 total = {};
    for (int j = 0; j < width; j += kLanes) {
      const F32 e = exp(load(p + j) - top);
      store(p + j, e);
      total += e;
    }
    if (top != before) {
      const float fade = __builtin_expf(before - top);
      scale_row(tile.acc + i * tile.ld, tile.ld, fade);
      scale_row(tile.mass[i], tile.refs, fade);
      tile.sum[i] *= fade;
      tile.top[i] = top;
    }
    tile.sum[i] += sum(total);
    for (int r = 0; r < block.run_count; ++r)
      tile.mass[i][block.runs[r].record] += sum_run(p + block.runs[r].begin, block.runs[r].end - block.runs[r].begin);
  }
  const Strided weights{tile.p, kBlock, 1};
  if (tile.m <= kFewRows) {
    gemm(weights, RowPointers<T>{block.v}, tile.m, tile.dim, block.count, tile.acc, tile.ld, true);
  } else {
    for (int j = 0; j < block.count; ++j) pack_row(block.v[j], tile.dim, 1.f, scratch + j * tile.ld);
    gemm(weights, Rows<float>{scratch, tile.ld}, tile.m, tile.ld, block.count, tile.acc, tile.ld, true);
  }
}

// Writes the result of query vector i: out = acc / sum, lse, mass (accumulated in place). Nothing seen: 0, -inf, 0.
template <class T>
inline void finish_row(QueryTile& tile, int i, T* out, float* lse) {
  const bool seen = tile.sum[i] > 0.f;
  const float inverse = seen ? 1.f / tile.sum[i] : 0.f;
  unpack_row(tile.acc + i * tile.ld, tile.dim, inverse, out);
  scale_row(tile.mass[i], tile.refs, inverse);
  *lse = seen ? tile.top[i] + __builtin_logf(tile.sum[i]) : -kInf;
}

}  // namespace
}  // namespace M3_LEVEL
}  // namespace m3
