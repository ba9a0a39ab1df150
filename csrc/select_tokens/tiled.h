// Weights of bf16 keys where there are tile registers, for `*.simd.cpp` files. Sixteen query vectors, as they lie,
// times keys packed once as columns: a product of tiles gives 256 scores in the time of 16 instructions, so that nearly
// all time goes to what becomes of them. The products of a block of queries are issued while the powers of the block
// before are computed, their sums fetched a tile or two later.
#pragma once

#include "common/attention_tile.h"
#include "common/tile_gemm.h"
#include "select_tokens/layout.h"
#include "select_tokens/power.h"

namespace m3 {
namespace M3_LEVEL {
namespace {

#if defined(__AMX_BF16__)

static_assert(kSelectRows == kTileSide && kLanes == kTileSide);

// While it lives results below 2^-126 count as zeros (see Power).
class Flushed {
 public:
  Flushed() : before_(_mm_getcsr()) { _mm_setcsr(before_ | _MM_FLUSH_ZERO_ON); }
  ~Flushed() { _mm_setcsr(before_); }
  Flushed(const Flushed&) = delete;

 private:
  const unsigned before_;
};

// Tile registers: sums 0 and 1, or 2 and 3; queries and keys in 4 and 6, the last elements of a head dim that is no
// multiple of 32 in 5 and 7.
class ScoreRegisters {
 public:
  explicit ScoreRegisters(int dim) {
    const int rest = dim % kPairRow;
    alignas(64) uint8_t shapes[64] = {1};  // palette; at 16 the bytes of a row, two each, at 48 the rows
    for (int i = 0; i < 8; ++i) {
      shapes[16 + 2 * i] = static_cast<uint8_t>(i == 5 ? 2 * rest : 64);
      shapes[48 + i] = static_cast<uint8_t>(i == 7 ? rest / 2 : kTileSide);
    }
    if (rest == 0) shapes[16 + 10] = shapes[48 + 5] = shapes[16 + 14] = shapes[48 + 7] = 0;
    tile_set_up(shapes);
  }
  ~ScoreRegisters() { tile_release(); }
  ScoreRegisters(const ScoreRegisters&) = delete;
};

// Keys as tiles of 16 columns: [tile, pair, 16], negated on request; columns behind the last are copies of it.
inline void pack_tiles(const BF16* k, int64_t stride, int dim, int64_t used, bool negated, uint32_t* keys) {
  const int64_t tile = pair_padded(dim) / 2 * kTileSide;
  for (int64_t c = 0; c < used; c += kTileSide, keys += tile) {
    const BF16* rows[kTileSide];
    const int count = static_cast<int>(used - c < kTileSide ? used - c : kTileSide);
    for (int i = 0; i < count; ++i) rows[i] = k + (c + i) * stride;
    pack_pair_columns(rows, count, dim, keys, kTileSide);
    if (negated)
      for (int64_t i = 0; i < tile; ++i) keys[i] ^= 0x80008000u;
  }
}

// Blocks of sixteen query vectors of one KV head: a query head's rows in turn, then the next head's. Blocks that lie
// within a head are read in place.
class QueryBlocks {
 public:
  // q: head 0 of the group, row 0; rows p.start..length. copy: [16, stride] for the other blocks.
  QueryBlocks(const M3SelectTokensParams& p, const BF16* q, int64_t length, BF16* copy, int64_t stride)
      : q_(q), to_head_(p.q_stride[2]), to_row_(p.q_stride[1]), start_(p.start), rows_(length - p.start),
        left_(rows_ * (p.q_heads / p.kv_heads)), dim_(p.dim), copy_(copy), copy_stride_(stride) {}

  int64_t left() const { return left_; }
  const BF16* at() const { return at_; }
  int64_t stride() const { return stride_; }

  // The next block; row[i]: of its query vectors (the last one again behind the last). Returns how many there are.
  int take(int64_t* row) {
    const int count = static_cast<int>(left_ < kTileSide ? left_ : kTileSide);
    at_ = q_ + head_ * to_head_ + (start_ + row_) * to_row_, stride_ = to_row_;
    const bool copied = row_ + kTileSide > rows_;
    for (int i = 0; i < kTileSide; ++i) {
      row[i] = start_ + row_;
      if (copied) memcpy(copy_ + i * copy_stride_, q_ + head_ * to_head_ + row[i] * to_row_, sizeof(BF16) * dim_);
      if (i + 1 < count && ++row_ == rows_) row_ = 0, ++head_;
    }
    if (copied) at_ = copy_, stride_ = copy_stride_;
    if ((left_ -= count) > 0 && ++row_ == rows_) row_ = 0, ++head_;
    return count;
  }

  // Asks for the first of the rows after this block.
  void prefetch() const {
    const BF16* next = q_ + head_ * to_head_ + (start_ + row_) * to_row_;
    for (int64_t i = 0; i < kTileSide && row_ + i < rows_; ++i, next += to_row_)
      for (int64_t d = 0; d < dim_; d += kPairRow) __builtin_prefetch(next + d);
  }

 private:
  const BF16* q_;
  int64_t to_head_, to_row_, start_, rows_, left_, dim_, head_ = 0, row_ = 0;
  BF16* copy_;
  const BF16* at_ = nullptr;
  int64_t copy_stride_, stride_ = 0;
};

// Scores of a block of queries, [tile, query, 16], in steps of two tiles of keys. A step's sums are stored by the next.
class Products {
 public:
  Products(int dim, const uint32_t* keys) : keys_(keys), dim_(dim), tile_(pair_padded(dim) / 2 * kTileSide) {}

  void begin(const BF16* q, int64_t stride, int64_t tiles, float* score) {
    q_ = q, stride_ = sizeof(BF16) * stride, tiles_ = tiles, score_ = score, at_ = 0, steps_ = (tiles + 1) / 2 + 1;
  }
  // Up to `part` of `whole` of all steps.
  void advance(int64_t part, int64_t whole) {
    for (const int64_t end = part * steps_ / whole; at_ < end; ++at_) at_ % 2 ? step<2, 0>() : step<0, 2>();
  }

 private:
  template <int Now, int Before>
  void step() {
    if (at_ > 0) store<Before>(2 * at_ - 2);
    if (2 * at_ + 1 < tiles_)
      multiply<Now, true>();
    else if (2 * at_ < tiles_)
      multiply<Now, false>();
  }

  template <int Sum, bool Both>
  void multiply() {
    const BF16* q = q_;
    const uint32_t *first = keys_ + 2 * at_ * tile_, *second = first + tile_;
    tile_zero<Sum>();
    if constexpr (Both) tile_zero<Sum + 1>();
    for (int d = 0; d + kPairRow <= dim_; d += kPairRow) {
      tile_load<4>(q, stride_);
      tile_load<6>(first, 64);
      tile_dot<Sum, 4, 6>();
      if constexpr (Both) {
        tile_load<6>(second, 64);
        tile_dot<Sum + 1, 4, 6>();
      }
      q += kPairRow, first += kTileWords, second += kTileWords;
    }
    if (dim_ % kPairRow == 0) return;
    tile_load<5>(q, stride_);
    tile_load<7>(first, 64);
    tile_dot<Sum, 5, 7>();
    if constexpr (Both) {
      tile_load<7>(second, 64);
      tile_dot<Sum + 1, 5, 7>();
    }
  }

  template <int Sum>
  void store(int64_t tile) {
    tile_store<Sum>(score_ + tile * kTileWords, 64);
    if (tile + 1 < tiles_) tile_store<Sum + 1>(score_ + (tile + 1) * kTileWords, 64);
  }

  const uint32_t* const keys_;
  const int dim_;
  const int64_t tile_;  // words of a tile of keys
  const BF16* q_ = nullptr;
  int64_t stride_ = 0, tiles_ = 0, at_ = 0, steps_ = 0;
  float* score_ = nullptr;
};

// Scores [tile, query, 16] of columns a query does not see become -inf.
inline void hide_scores(float* score, int64_t tiles, const int64_t* seen) {
  I32 lane;
  for (int i = 0; i < kLanes; ++i) lane[i] = i;
  for (int r = 0; r < kTileSide; ++r)
    for (int64_t t = seen[r] / kTileSide; t < tiles; ++t) {
      float* at = score + t * kTileWords + r * kTileSide;
      const I32 visible = lane < static_cast<int32_t>(seen[r] - t * kTileSide);
      m3::M3_LEVEL::store(at, select(visible, load(at), splat(-kInf)));
    }
}

// weight += sum of the softmax rows of `count` of a block's sixteen queries; `next` is computed meanwhile.
inline void add_tiled_softmax(float* score, int64_t tiles, int count, float factor, Products& next, float* weight) {
  const Power power;
  F32 part[kTileSide];
  float offset[kTileSide], share[kTileSide];
#pragma GCC unroll 16
  for (int r = 0; r < kTileSide; ++r) part[r] = load(score + r * kTileSide);
  for (int64_t t = 1; t < tiles; ++t)
#pragma GCC unroll 16
    for (int r = 0; r < kTileSide; ++r) part[r] = max(part[r], load(score + t * kTileWords + r * kTileSide));
  store(offset, max_each(part) * -factor);
#pragma GCC unroll 16
  for (int r = 0; r < kTileSide; ++r) part[r] = F32{};
  for (int64_t t = 0; t < tiles; ++t) {
    float* at = score + t * kTileWords;
#pragma GCC unroll 16
    for (int r = 0; r < kTileSide; ++r) {
      const F32 e = power(load(at + r * kTileSide) * factor + offset[r]);
      store(at + r * kTileSide, e);
      part[r] += e;
    }
    next.advance(t + 1, tiles);
  }
  I32 lane;
  for (int i = 0; i < kLanes; ++i) lane[i] = i;
  store(share, select(lane < count, 1.f / sum_each(part), F32{}));
  for (int64_t t = 0; t < tiles; ++t) {  // the block first: fewer roundings of the long sum
    const float* at = score + t * kTileWords;
    F32 block[2] = {};
#pragma GCC unroll 16
    for (int r = 0; r < kTileSide; ++r) block[r % 2] += load(at + r * kTileSide) * share[r];
    store(weight + t * kTileSide, load(weight + t * kTileSide) + (block[0] + block[1]));
  }
}

// Running log-sum-exp per column: highest[c], in units of the powers, and weight[c] = sum 2^(score - highest).
inline void add_tiled_powers(const float* score, int64_t tiles, int count, float factor, Products& next,
                             float* highest, float* weight) {
  const Power power;
  for (int64_t t = 0; t < tiles; ++t, score += kTileWords, highest += kTileSide, weight += kTileSide) {
    next.advance(t + 1, tiles);
    F32 top = load(score);
    for (int r = 1; r < count; ++r) top = max(top, load(score + r * kTileSide));
    const F32 before = load(highest);
    top = max(before, top * factor);
    F32 total = load(weight) * power(before - top);
    for (int r = 0; r < count; ++r) total += power(load(score + r * kTileSide) * factor - top);
    store(highest, top);
    store(weight, total);
  }
}

// The weights of all columns: `used` keys at k. ahead() is called for every block of queries, for what should be
// fetched meanwhile.
template <class Ahead>
void add_tiled(const M3SelectTokensParams& p, const BF16* q, const BF16* k, int64_t length, int64_t used, float factor,
               Ahead ahead, const SelectLayout& at, float* workspace) {
  const int dim = static_cast<int>(p.dim);
  const bool causal = p.rule == M3_SELECT_CAUSAL;
  uint32_t* keys = reinterpret_cast<uint32_t*>(workspace + at.keys);
  pack_tiles(k, p.k_stride[1], dim, used, factor < 0.f, keys);
  factor = __builtin_fabsf(factor) > 0x1p-126f ? __builtin_fabsf(factor) : 0x1p-126f;  // 0 times -inf would be a NaN
  QueryBlocks queries(p, q, length, reinterpret_cast<BF16*>(workspace + at.query), 2 * at.width);
  Products products(dim, keys);
  const ScoreRegisters registers(dim);
  const Flushed flushed;
  float *score = workspace + at.score, *next = score + kSelectRows * at.columns;
  int64_t row[kTileSide];
  int count = 0;
  int64_t tiles = 0;
  const auto begin = [&](float* to) {
    ahead();
    count = queries.take(row);
    int64_t seen = used;
    if (causal) {
      seen = 0;
      for (int r = 0; r < kTileSide; ++r) seen = row[r] + 1 > seen ? row[r] + 1 : seen;
    }
    tiles = (seen + kTileSide - 1) / kTileSide;
    products.begin(queries.at(), queries.stride(), tiles, to);
  };
  begin(score);
  products.advance(1, 1);
  for (bool more = true; more;) {
    int64_t seen[kTileSide];
    for (int r = 0; r < kTileSide; ++r) seen[r] = causal ? row[r] + 1 : used;
    const int now_count = count;
    const int64_t now_tiles = tiles;
    more = queries.left() > 0;
    if (more) begin(next), queries.prefetch();
    if (p.rule == M3_SELECT_EXP) {
      add_tiled_powers(score, now_tiles, now_count, factor, products, workspace + at.highest, workspace + at.weight);
    } else {
      hide_scores(score, now_tiles, seen);
      add_tiled_softmax(score, now_tiles, now_count, factor, products, workspace + at.weight);
    }
    float* const done = score;
    score = next, next = done;
  }
}

#endif  // __AMX_BF16__

}  // namespace
}  // namespace M3_LEVEL
}  // namespace m3
