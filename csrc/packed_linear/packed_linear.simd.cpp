// Lanes run over the 16 rows of a tile, so a block's scales are one vector, and an activation is broadcast to all of
// them. Few rows of x read the packed blocks directly: weights stream through once, expanded in registers. Many rows
// expand four tiles into a panel first and multiply it again and again.
#include "packed_linear/by_floats.h"
#include "packed_linear/by_pairs.h"
#include "packed_linear/by_tiles.h"
#include "packed_linear/round.h"
#include "packed_linear/sums.h"

namespace m3 {
namespace M3_LEVEL {
namespace {

#if defined(__AMX_BF16__)
typedef ByTiles Exact;
#elif defined(__AVX512BF16__)
typedef ByPairs Exact;
#else
typedef ByFloats Exact;
#endif

// Sums of one row and tile -> out, as far as the weight has rows.
inline void write(const M3PackedLinearParams& p, int64_t row, int64_t tile, const float* sums) {
  const int64_t first = tile * M3_PACKED_ROWS, at = row * p.out_stride + first, n = p.weight.rows - first;
  with_dtype(p.out_dtype, [&](auto tag) {
    using Out = decltype(tag);
    Out* out = static_cast<Out*>(p.out) + at;
    Out whole[M3_PACKED_ROWS];
    Out* to = n >= M3_PACKED_ROWS ? out : whole;
    for (int c = 0; c < M3_PACKED_ROWS; c += kLanes) store(to + c, load(sums + c));
    if (to == whole) memcpy(out, whole, sizeof(Out) * n);
  });
}

// Calls take(row, n) after the sums of n rows times `Tiles` tiles are at to(row), `pitch` apart.
template <class By, class W, int Tiles, class Fetch, class To, class Take>
inline void few_rows(const M3PackedLinearParams& p, int64_t tile, int64_t row, int64_t end, Fetch& prefetch,
                     const To& to, int64_t pitch, const Take& take) {
  constexpr int kGroup = By::kGroup;
  while (row < end) {
    const int64_t left = end - row;
    int n = 1;
    if (kGroup >= 8 && left >= 8)
      By::template direct<W, kGroup, Tiles>(p, tile, row, prefetch, to(row), pitch), n = kGroup;
    else if (kGroup >= 4 && left >= 4)
      By::template direct<W, kGroup >= 8 ? kGroup / 2 : kGroup, Tiles>(p, tile, row, prefetch, to(row), pitch), n = 4;
    else if (left >= 2)
      By::template direct<W, 2, Tiles>(p, tile, row, prefetch, to(row), pitch), n = 2;
    else
      By::template direct<W, 1, Tiles>(p, tile, row, prefetch, to(row), pitch);
    take(row, n);
    row += n;
  }
}

template <class By, class W, int Tiles, class Fetch>
void few_rows(const M3PackedLinearParams& p, int64_t tile, Fetch& prefetch) {
  constexpr int kPitch = Tiles * M3_PACKED_ROWS;
  alignas(64) float sum[By::kGroup * kPitch];
  few_rows<By, W, Tiles>(
      p, tile, 0, p.count, prefetch, [&](int64_t) { return sum; }, kPitch,
      [&](int64_t row, int n) {
        for (int m = 0; m < n; ++m)
          for (int t = 0; t < Tiles; ++t) write(p, row + m, tile + t, sum + m * kPitch + t * M3_PACKED_ROWS);
      });
}

template <class By, class W, class Fetch>
void few_rows(const M3PackedLinearParams& p, int64_t begin, int64_t end, Fetch prefetch) {
  int64_t tile = begin;
  if constexpr (By::kDirectTiles == 2)
    if (p.count >= By::kGroup)
      for (; tile + 2 <= end; tile += 2) few_rows<By, W, 2>(p, tile, prefetch);
  for (; tile < end; ++tile) few_rows<By, W, 1>(p, tile, prefetch);
}

template <class By, class W>
void few_rows(const M3PackedLinearParams& p, int64_t begin, int64_t end) {
  // Where products take longer than reading, callers cut their tiles into small pieces: look beyond this one.
  const Prefetch prefetch(p.weight, begin, p.count >= 4 ? m3_packed_tiles(&p.weight) : end);
  if (p.stretches > 0)
    few_rows<By, W>(p, begin, end, PrefetchBoth(prefetch, p, (end - begin) * (p.weight.cols / M3_PACKED_COLS)));
  else
    few_rows<By, W>(p, begin, end, prefetch);
}

template <class By, class W>
void many_rows(const M3PackedLinearParams& p, int64_t begin, int64_t end) {
  alignas(64) float sum[kSumRows * kSumTiles * M3_PACKED_ROWS];
  typename By::template Panel<W> panel;
  const int64_t passes = (p.count + kSumRows - 1) / kSumRows, each = (p.count + passes - 1) / passes;
  for (int64_t row = 0; row < p.count; row += each) {
    const int64_t rows = p.count - row < each ? p.count - row : each;
    for (int64_t tile = begin; tile < end; tile += kSumTiles) {
      const int n = static_cast<int>(end - tile < kSumTiles ? end - tile : kSumTiles), pitch = n * M3_PACKED_ROWS;
      const int64_t tiles[kSumTiles] = {tile, tile + 1, tile + 2, tile + 3};
      panel.run(p, tiles, n, row, rows, sum, pitch);
      for (int64_t m = 0; m < rows; ++m)
        for (int t = 0; t < n; ++t) write(p, row + m, tile + t, sum + m * pitch + t * M3_PACKED_ROWS);
    }
  }
}

template <class By, class W>
void sums(const M3PackedLinearParams& p, const int64_t* tiles, int count, int64_t row, int64_t rows, float* sum,
          int64_t pitch) {
  if (p.count > By::kDirect) {
    typename By::template Panel<W> panel;
    return panel.run(p, tiles, count, row, rows, sum, pitch);
  }
  for (int t = 0; t < count; ++t) {
    Prefetch prefetch(p.weight, tiles[t], m3_packed_tiles(&p.weight));
    const auto to = [&](int64_t at) { return sum + (at - row) * pitch + t * M3_PACKED_ROWS; };
    few_rows<By, W, 1>(p, tiles[t], row, row + rows, prefetch, to, pitch, [](int64_t, int) {});
  }
}

// How products are made of these activations and weights: body(products, weight).
template <class Body>
inline void with_products(const M3PackedLinearParams& p, const Body& body) {
#if defined(M3_BYTE_PRODUCTS)
  if (p.activations == M3_ACTIVATIONS_MXINT8)
    return p.weight.format == M3_WEIGHT_Q8_0 ? body(ByBytes{}, Q8Weight{}) : body(ByBytes{}, Q4Weight{});
#endif
  switch (p.weight.format) {
    case M3_WEIGHT_BF16: return body(Exact{}, Bf16Weight{});
    case M3_WEIGHT_Q8_0: return body(Exact{}, Q8Weight{});
    case M3_WEIGHT_Q4_1: return body(Exact{}, Q4Weight{});
  }
}

template <class T>
void pack_rows(const T* x, int64_t stride, int64_t count, const M3PackedRows& to, int64_t row) {
  for (int64_t m = 0; m < count; ++m)
    for (int64_t b = 0; b < to.cols / M3_PACKED_COLS; ++b) {
      F32 v[kBlockParts];
      for (int i = 0; i < kBlockParts; ++i) v[i] = load(x + m * stride + b * M3_PACKED_COLS + i * kLanes);
      store_block(to, row + m, b, v);
    }
}

}  // namespace

void packed_linear(const M3PackedLinearParams& p, int64_t begin, int64_t end) {
  with_products(p, [&](auto products, auto weight) {
    using By = decltype(products);
    using W = decltype(weight);
    if (p.count <= By::kDirect)
      few_rows<By, W>(p, begin, end);
    else
      many_rows<By, W>(p, begin, end);
  });
}

void packed_linear_sums(const M3PackedLinearParams& p, const int64_t* tiles, int count, int64_t row, int64_t rows,
                        float* sum, int64_t pitch) {
  with_products(p, [&](auto products, auto weight) {
    sums<decltype(products), decltype(weight)>(p, tiles, count, row, rows, sum, pitch);
  });
}

// x [count, stride] becomes rows [row, row + count).
void pack_activations(const void* x, m3_dtype dtype, int64_t stride, int64_t count, const M3PackedRows& to,
                      int64_t row) {
  with_dtype(dtype, [&](auto tag) { pack_rows(static_cast<const decltype(tag)*>(x), stride, count, to, row); });
}

}  // namespace M3_LEVEL
}  // namespace m3
