// Online softmax on stack tiles, for `*.simd.cpp` files. A QueryTile holds up to kTileRows query vectors (the rows of a
// block times the query heads of a group); keys come in blocks of up to kBlock, so that every key and value is loaded
// and converted once for all query vectors that see it. After Milakov and Gimelshein, arXiv 1805.02867.
#pragma once

#include "common/gemm_tile.h"
#include "common/split_tile.h"
#include "common/tile_gemm.h"

namespace m3 {
namespace M3_LEVEL {
namespace {

constexpr int kMaxDim = 256;
constexpr int kBlock = 64;
constexpr int kTileRows = 64;
// Up to this many query vectors, scores are dot products with the rows as they lie; above it, transposing keys pays.
constexpr int kFewRows = 8;

// Whether products are of pairs as they lie. Not where there are tile registers: those processors take two cycles for
// vdpbf16ps and one for two multiply-adds of 16 floats.
template <class T>
constexpr bool kByPairs = kPaired<T> && !kTileDots;

inline int padded(int dim) { return (dim + kLanes - 1) / kLanes * kLanes; }

// Pointers to the key and value rows of one block.
template <class T>
struct KeyBlock {
  struct Run {
    int begin, end, record;
    const float* bias;  // of record head 0, or null
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

// Vectors lo..lo + m of a tile may be worked on apart from the others: those of one KV head, where it holds several.
struct QueryTile {
  alignas(64) float q[kTileRows * kMaxDim];             // [m, ld], scaled, zeros behind dim
  alignas(64) uint32_t q_pairs[kTileRows * kMaxDim / 2];  // [m, ld / 2], not scaled: exact in bf16 (kByPairs<T> only)
  alignas(64) float acc[kTileRows * kMaxDim];           // [m, ld], sum of exp(s - top) v
  alignas(64) float p[kTileRows * kBlock];
  alignas(64) uint32_t p_pairs[kTileRows * kBlock / 2];  // p rounded to bf16
  float top[kTileRows + kLanes], sum[kTileRows + kLanes];
  float* mass[kTileRows];  // [refs] each: sum of exp(s - top) per record
  float scale;
  int m, dim, ld;
  int64_t refs;

  void begin(int rows, int width, float factor, int64_t records) {
    m = rows, dim = width, ld = pair_padded(width), scale = factor, refs = records;
    memset(acc, 0, sizeof(float) * m * ld);
    for (int i = 0; i < m + kLanes; ++i) top[i] = -kInf, sum[i] = 0.f;
  }
};

inline void scale_row(float* row, int64_t n, float factor) {
  int64_t d = 0;
  for (; d + kLanes <= n; d += kLanes) store(row + d, load(row + d) * factor);
  for (; d < n; ++d) row[d] *= factor;
}

// Bias and visibility: keys at or behind seen[i] (or `count` where seen is null) and the padding become -inf.
inline void mask_scores(const float* bias, int count, const int* seen, int m, float* p) {
  const int width = padded(count);
  if (bias)
    for (int i = 0; i < m; ++i)
      for (int j = 0; j < width; j += kLanes)  // bias behind count is stale, but hidden below
        store(p + i * kBlock + j, load(p + i * kBlock + j) + load(bias + j));
  if (seen == nullptr && count == width) return;
  for (int i = 0; i < m; ++i)
    for (int j = seen ? seen[i] : count; j < width; ++j) p[i * kBlock + j] = -kInf;
}
template <class T>
inline void mask_scores(const KeyBlock<T>& block, const int* seen, int m, float* p) {
  mask_scores(block.biased ? block.bias : nullptr, block.count, seen, m, p);
}

// Lane i of the result is the largest of v[i]; `v` is overwritten.
template <int Step = 1>
inline F32 max_each(F32* v) {
#pragma GCC unroll 16
  for (int i = 0; i < kLanes / Step; i += 2) v[i / 2] = max(mix<Step, 0>(v[i], v[i + 1]), mix<Step, 1>(v[i], v[i + 1]));
  if constexpr (2 * Step < kLanes)
    return max_each<2 * Step>(v);
  else
    return v[0];
}

// Takes the masked scores tile.p[lo..lo + m, 0..count) into the running softmax: they become exp(s - top), and what was
// summed before fades to the new top. kLanes rows at a time, each with the same operations whatever the others are.
template <bool Pairs>
inline void absorb(QueryTile& tile, int lo, int m, int count) {
  const int width = padded(count);
  for (int r = lo; r < lo + m; r += kLanes) {
    const int n = lo + m - r < kLanes ? lo + m - r : kLanes;
    F32 part[kLanes];
    for (int i = 0; i < kLanes; ++i) part[i] = splat(-kInf);
    for (int i = 0; i < n; ++i) {
      const float* p = tile.p + (r + i) * kBlock;
      for (int j = 0; j < width; j += kLanes) part[i] = max(part[i], load(p + j));
    }
    const F32 before = load(tile.top + r), top = max(before, max_each(part));
    const F32 base = select(top == splat(-kInf), F32{}, top);  // nothing seen yet: exp(-inf - 0) = 0
    float bases[kLanes], fades[kLanes];
    const F32 fade = exp(before - base);
    store(bases, base);
    store(fades, fade);
    store(tile.top + r, top);
    for (int i = 0; i < n; ++i) {
      float* p = tile.p + (r + i) * kBlock;
      F32 total = {};
      for (int j = 0; j < width; j += kLanes) {
        const F32 e = exp(load(p + j) - bases[i]);
        store(p + j, e);
        if constexpr (Pairs) store(reinterpret_cast<BF16*>(tile.p_pairs + (r + i) * (kBlock / 2)) + j, e);
        total += e;
      }
      part[i] = total;
      if (fades[i] != 1.f) {
        scale_row(tile.acc + (r + i) * tile.ld, tile.ld, fades[i]);
        scale_row(tile.mass[r + i], tile.refs, fades[i]);
      }
    }
    for (int i = n; i < kLanes; ++i) part[i] = F32{};
    store(tile.sum + r, load(tile.sum + r) * fade + sum_each(part));
  }
}

// Adds up the weights of each record: whole vectors of kLanes rows side by side, then what is left of each row.
template <class T>
inline void add_mass(QueryTile& tile, int lo, int m, const KeyBlock<T>& block) {
  for (int r = 0; r < block.run_count; ++r) {
    const auto& run = block.runs[r];
    const int whole = run.begin + (run.end - run.begin) / kLanes * kLanes;
    for (int at = lo; at < lo + m; at += kLanes) {
      const int n = lo + m - at < kLanes ? lo + m - at : kLanes;
      F32 part[kLanes] = {};
      for (int i = 0; i < n; ++i)
        for (int j = run.begin; j < whole; j += kLanes) part[i] += load(tile.p + (at + i) * kBlock + j);
      float sums[kLanes];
      store(sums, sum_each(part));
      for (int i = 0; i < n; ++i) {
        float rest = 0.f;
        for (int j = whole; j < run.end; ++j) rest += tile.p[(at + i) * kBlock + j];
        tile.mass[at + i][run.record] += sums[i] + rest;
      }
    }
  }
}

// Cache lines of a row.
template <class T>
inline int row_lines(int dim) {
  return (dim * static_cast<int>(sizeof(T)) + 63) / 64;
}

struct Nothing {
  static constexpr bool kFetches = false;
  void operator()(int) const {}
  const char* take(int, const void*) const { return nullptr; }
};

// Few query vectors with rows that are taken apart (split_tile.h).
template <class T>
constexpr bool kSplit = false;
template <>
constexpr bool kSplit<BF16> = !kByPairs<BF16>;

// tile.p[lo..lo + m, at..] = q . k for few query vectors and `count` keys where they lie. Columns up to the next multiple
// of kLanes are written, too, those of the next row never: fewer than kLanes keys at the end of a row make a detour.
template <class T, class Row, class Step>
inline void few_scores(QueryTile& tile, int lo, int m, const Row& row, int count, int at, Step& step) {
  float* const to = tile.p + lo * kBlock + at;
  alignas(64) float narrow[kFewRows * kLanes];
  const bool detour = at + padded(count) > kBlock;
  float* const p = detour ? narrow : to;
  const int64_t pitch = detour ? kLanes : kBlock;
  if constexpr (kByPairs<T>) {
    by_four(m, [&](auto rows, int i) {
      pair_dot_rows<decltype(rows)::value>(tile.q_pairs + (lo + i) * (tile.ld / 2), tile.ld / 2, row, count, tile.dim,
                                           tile.scale, p + i * pitch, pitch, step);
    });
  } else if constexpr (kSplit<T>) {
    alignas(64) float apart[kFewRows * kMaxDim];
    for (int i = 0; i < m; ++i)
      for (int d = 0; d < tile.ld; d += kPairRow) {
        F32 even, odd;
        take_apart(tile.q + (lo + i) * tile.ld + d, &even, &odd);
        store(apart + i * tile.ld + d, even);
        store(apart + i * tile.ld + d + kLanes, odd);
      }
    by_four(m, [&](auto rows, int i) {
      split_dot_rows<decltype(rows)::value>(apart + i * tile.ld, tile.ld, row, count, tile.dim, p + i * pitch, pitch,
                                            step);
    });
  } else {
    const T* rows[kBlock];
    for (int j = 0; j < count; ++j) rows[j] = row(j);
    step(count * row_lines<T>(tile.dim));
    dot(tile.q + lo * tile.ld, tile.ld, m, rows, count, tile.dim, p, pitch);
  }
  if (detour)
    for (int i = 0; i < m; ++i) memcpy(to + i * kBlock, narrow + i * kLanes, sizeof(float) * count);
}

// tile.acc[lo..lo + m] += weights at `at` of the block . `count` values where they lie; at is even.
template <class T, class Row, class Step>
inline void few_values(QueryTile& tile, int lo, int m, const Row& row, int count, int at, Step& step) {
  float* acc = tile.acc + lo * tile.ld;
  if constexpr (kByPairs<T>) {
    by_four(m, [&](auto rows, int i) {
      pair_add_rows<decltype(rows)::value>(tile.p_pairs + (lo + i) * (kBlock / 2) + at / 2, kBlock / 2, row, count,
                                           tile.dim, acc + i * tile.ld, tile.ld, step);
    });
  } else if constexpr (kSplit<T>) {
    by_four(m, [&](auto rows, int i) {
      split_add_rows<decltype(rows)::value>(tile.p + (lo + i) * kBlock + at, kBlock, row, count, tile.dim,
                                            acc + i * tile.ld, tile.ld, step);
    });
  } else {
    const T* rows[kBlock];
    for (int j = 0; j < count; ++j) rows[j] = row(j);
    step(count * row_lines<T>(tile.dim));
    gemm(Strided{tile.p + lo * kBlock + at, kBlock, 1}, RowPointers<T>{rows}, m, tile.dim, count, acc, tile.ld, true);
  }
}

// Takes a block into the running softmax of the tile's vectors lo..lo + m: vector lo + i sees its first seen[i] keys
// (all of them where seen is null).
template <class T>
inline void consume(QueryTile& tile, int lo, int m, const KeyBlock<T>& block, const int* seen) {
  if (block.count == 0) return;
  float* p = tile.p + lo * kBlock;
  Nothing nothing;
  if (m <= kFewRows) {
    few_scores<T>(tile, lo, m, [&](int j) { return block.k[j]; }, block.count, 0, nothing);
    mask_scores(block, seen, m, p);
    absorb<kByPairs<T>>(tile, lo, m, block.count);
    add_mass(tile, lo, m, block);
    few_values<T>(tile, lo, m, [&](int j) { return block.v[j]; }, block.count, 0, nothing);
    return;
  }
  alignas(64) uint32_t scratch[kMaxDim * kBlock];
  float* acc = tile.acc + lo * tile.ld;
  if constexpr (kByPairs<T>) {
    pack_pair_columns(block.k, block.count, tile.dim, scratch, kBlock);
    pair_gemm<false>(tile.q_pairs + lo * (tile.ld / 2), tile.ld / 2, scratch, kBlock, m, padded(block.count),
                     tile.dim / 2, tile.scale, p, kBlock);
  } else {
    float* columns = reinterpret_cast<float*>(scratch);
    pack_columns(block.k, block.count, tile.dim, columns, kBlock);
    gemm(Strided{tile.q + lo * tile.ld, tile.ld, 1}, Rows<float>{columns, kBlock}, m, padded(block.count), tile.dim, p,
         kBlock, false);
  }
  mask_scores(block, seen, m, p);
  absorb<kByPairs<T>>(tile, lo, m, block.count);
  add_mass(tile, lo, m, block);
  if constexpr (kByPairs<T>) {
    pack_row_pairs(block.v, block.count, tile.dim, scratch, tile.ld);
    pair_gemm<true>(tile.p_pairs + lo * (kBlock / 2), kBlock / 2, scratch, tile.ld, m, tile.ld, (block.count + 1) / 2,
                    1.f, acc, tile.ld);
  } else {
    float* values = reinterpret_cast<float*>(scratch);
    for (int j = 0; j < block.count; ++j) pack_row(block.v[j], tile.dim, 1.f, values + j * tile.ld);
    gemm(Strided{p, kBlock, 1}, Rows<float>{values, tile.ld}, m, padded(tile.dim), block.count, acc, tile.ld, true);
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
