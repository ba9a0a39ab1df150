// The paper's rule for bf16 where dot products have an instruction of their own: while four query vectors are scored,
// the powers of the four before them and the column sums of the four before those are computed in between. Products
// fill the multiplying pipes of a core and nothing else; most of a softmax (differences, maxima, tables) runs beside
// them.
#pragma once

#include "common/pair_tile.h"
#include "select_tokens/power.h"
#include "select_tokens/queries.h"

namespace m3 {
namespace M3_LEVEL {
namespace {

#if defined(__AVX512BF16__) && !defined(__AMX_BF16__)

constexpr int kWovenRows = 4, kWovenTile = 4;  // query vectors by vectors of columns: 16 sums
constexpr int kWovenWidth = kWovenTile * kLanes;
constexpr int kWovenSteps = 32;                // pairs of a tile's rows that have a softmax woven in

// Of four vectors: lane i, and every fourth after it, is the sum (the largest) of v[i].
struct Sum {
  F32 operator()(F32 a, F32 b) const { return a + b; }
};
struct Largest {
  F32 operator()(F32 a, F32 b) const { return _mm512_max_ps(a, b); }
};
template <class Join>
inline F32 join_four(const F32* v, const Join& join) {
  const F32 a = join(mix<1, 0>(v[0], v[1]), mix<1, 1>(v[0], v[1]));
  const F32 b = join(mix<1, 0>(v[2], v[3]), mix<1, 1>(v[2], v[3]));
  const F32 c = join(mix<2, 0>(a, b), mix<2, 1>(a, b));
  const F32 d = join(c, __builtin_shufflevector(c, c, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7));
  return join(d, __builtin_shufflevector(d, d, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11));
}

// What is known of four query vectors, by stage. score: a [4, 64] block per tile, their products with the keys, then
// powers.
struct WovenRows {
  float* score;
  F32 total[kWovenRows];     // sums of powers
  float offset[kWovenRows];  // -factor * largest score
  float share[kWovenRows];   // 1 / total; 0: not a row
};

inline U32 splat_pair(const BF16* p) {
  uint32_t pair;
  memcpy(&pair, p, sizeof pair);
  return splat_pair(pair);
}

// acc += one pair of four rows times the same pair of 64 keys.
inline void dot_step(const BF16* const* q, int d, const uint32_t* keys, F32 (*acc)[kWovenTile]) {
  U32 x[kWovenTile];
#pragma GCC unroll 4
  for (int n = 0; n < kWovenTile; ++n) {
    x[n] = load_pairs(keys + n * kLanes);
    M3_OPAQUE(x[n]);  // stays in a register: the compiler would rather load it again for every row
  }
#pragma GCC unroll 4
  for (int r = 0; r < kWovenRows; ++r) {
    const U32 y = splat_pair(q[r] + 2 * d);
#pragma GCC unroll 4
    for (int n = 0; n < kWovenTile; ++n) acc[r][n] = dot_pairs(acc[r][n], y, x[n]);
  }
}

inline void power_step(const Power& power, float factor, WovenRows& rows, int r, float* score) {
  const F32 e = power(load(score) * factor + rows.offset[r]);
  store(score, e);
  rows.total[r] += e;
}

inline void sum_step(const WovenRows& rows, const float* score, float* weight) {
  F32 block = load(score) * rows.share[0];
#pragma GCC unroll 4
  for (int r = 1; r < kWovenRows; ++r) block += load(score + r * kWovenWidth) * rows.share[r];
  store(weight, load(weight) + block);
}

// One tile, its scores at `at` of each stage and its columns at `weight`: the scores of `now` are computed (high: the
// largest of each row so far), those of `then` become powers, those of `past` are added to the weights.
inline void woven_tile(const BF16* const* q, const uint32_t* keys, int pairs, float factor, int64_t at, WovenRows& now,
                       WovenRows& then, const WovenRows& past, F32* high, I32 visible, float* weight) {
  constexpr int kSteps = kWovenSteps / kWovenTile, kEach = kSteps / kWovenRows;
  const Power power;
  F32 acc[kWovenRows][kWovenTile] = {};
  float *powers = then.score + at, *shares = past.score + at;
  int d = 0;
  for (; d < kWovenSteps; powers += kLanes, shares += kLanes, weight += kLanes) {
#pragma GCC unroll 4
    for (int r = 0; r < kWovenRows; ++r) {
#pragma GCC unroll 2
      for (int i = 0; i < kEach; ++i) dot_step(q, d + r * kEach + i, keys + (r * kEach + i) * kWovenWidth, acc);
      power_step(power, factor, then, r, powers + r * kWovenWidth);
    }
    sum_step(past, shares, weight);
    d += kSteps, keys += kSteps * kWovenWidth;
  }
  for (; d < pairs; ++d, keys += kWovenWidth) dot_step(q, d, keys, acc);
#pragma GCC unroll 4
  for (int r = 0; r < kWovenRows; ++r) {
    acc[r][kWovenTile - 1] = select(visible, acc[r][kWovenTile - 1], splat(-kInf));
#pragma GCC unroll 4
    for (int n = 0; n < kWovenTile; ++n) {
      store(now.score + at + r * kWovenWidth + n * kLanes, acc[r][n]);
      high[r] = _mm512_max_ps(high[r], acc[r][n]);
    }
  }
}

// Keys as tiles of 64 columns: [tile, pair, 64]; columns from `used` up to a whole vector are copies of the last row.
inline void pack_woven(const BF16* k, int64_t stride, int dim, int64_t used, uint32_t* keys) {
  const int64_t tile = pair_padded(dim) / 2 * kWovenWidth;
  for (int64_t c = 0; c < used; c += kLanes) {
    const BF16* rows[kLanes];
    const int count = static_cast<int>(used - c < kLanes ? used - c : kLanes);
    for (int i = 0; i < count; ++i) rows[i] = k + (c + i) * stride;
    pack_pair_columns(rows, count, dim, keys + c / kWovenWidth * tile + c % kWovenWidth, kWovenWidth);
  }
}

// weight[c] += the softmax rows of the query vectors over `used` columns of keys from pack_woven. ahead() is called for
// every four query vectors, for what should be fetched meanwhile. dim is at least 2 * kWovenSteps, factor above 0, used
// fills whole tiles but for the last vector, and score has room for three times [4, used] in whole tiles.
template <class Ahead>
void add_woven(Queries<BF16> queries, Ahead ahead, int dim, float factor, const uint32_t* keys, int64_t used,
               float* score, float* weight) {
  constexpr int64_t kBlock = kWovenRows * kWovenWidth;
  const int64_t tiles = (used + kWovenWidth - 1) / kWovenWidth, tile = pair_padded(dim) / 2 * kWovenWidth;
  WovenRows stage[3] = {};
  for (int i = 0; i < 3; ++i) stage[i].score = score + i * tiles * kBlock;
  memset(score, 0, sizeof(float) * 3 * tiles * kBlock);
  I32 lane;
  for (int i = 0; i < kLanes; ++i) lane[i] = i;
  const I32 all = lane < kLanes, visible = lane < static_cast<int32_t>(used - (tiles * kWovenWidth - kLanes));
  const int64_t count = queries.left, blocks = (count + kWovenRows - 1) / kWovenRows;
  const Power power;
  const BF16* next[kWovenRows];
  for (int r = 0; r < kWovenRows; ++r) next[r] = queries.take();
  for (int64_t block = 0; block < blocks + 2; ++block) {
    WovenRows &now = stage[block % 3], &then = stage[(block + 2) % 3], &past = stage[(block + 1) % 3];
    for (int r = 0; r < kWovenRows; ++r) then.total[r] = F32{};
    if (block < blocks) {
      const BF16* q[kWovenRows];
      F32 high[kWovenRows];
      for (int r = 0; r < kWovenRows; ++r) {
        q[r] = next[r], next[r] = queries.take(), high[r] = splat(-kInf);
        for (int d = 0; d < dim; d += kPairRow) __builtin_prefetch(next[r] + d);
      }
      ahead();
      for (int64_t t = 0; t < tiles; ++t)
        woven_tile(q, keys + t * tile, dim / 2, factor, t * kBlock, now, then, past, high,
                   t + 1 < tiles ? all : visible, weight + t * kWovenWidth);
      float top[kLanes];
      store(top, join_four(high, Largest{}) * -factor);
      memcpy(now.offset, top, sizeof now.offset);
    } else {
      for (int64_t c = 0; c < tiles * kWovenWidth; c += kLanes) {
        const int64_t at = c / kWovenWidth * kBlock + c % kWovenWidth;
        if (block == blocks)
          for (int r = 0; r < kWovenRows; ++r) power_step(power, factor, then, r, then.score + at + r * kWovenWidth);
        sum_step(past, past.score + at, weight + c);
      }
    }
    float share[kLanes];
    store(share, 1.f / join_four(then.total, Sum{}));
    for (int r = 0; r < kWovenRows; ++r) {
      const int64_t i = (block - 1) * kWovenRows + r;
      then.share[r] = i >= 0 && i < count ? share[r] : 0.f;
    }
  }
}

#endif

}  // namespace
}  // namespace M3_LEVEL
}  // namespace m3
