// Attention on tile registers (level amx), for `*.simd.cpp` files: the query vectors of a block are columns. Keys are
// operands as they lie, scores K Q^T have a query vector per lane, so maxima, sums and masks need no shuffles, and what
// comes out of a pair of rows of them is a row of the operand of V^T P^T. Only values are transposed, once per block of
// keys for all stripes of 32 columns.
#pragma once

#include "common/attention_walk.h"
#include "common/power.h"
#include "common/tile_gemm.h"

namespace m3 {
namespace M3_LEVEL {
namespace {

#if defined(__AMX_BF16__)

constexpr int kStripe = 2 * kTileSide;  // query vectors of a product: its work is one burst of the tile unit
constexpr int kStripes = 8;             // at most

// Query vectors of one KV head, their running softmax and what it works on. Scores are in units of log2.
class QueryColumns {
 public:
  // As many query vectors as fit: 256, up to 128 dimensions.
  static int most(int dim) { return stripes(dim) * kStripe; }

  // The vectors of rows [row, row + rows) and `group` heads from `head` on: vector i is row i / group, head i % group.
  // q points to the first one, mass to that of row 0, head 0.
  void begin(const BF16* q, const int64_t* stride, int64_t heads, int64_t row, int64_t head, int rows, int group,
             int dim, float scale, float* mass, int64_t refs) {
    m_ = rows * group, dim_ = dim, ld_ = pair_padded(dim) / 2, height_ = padded(dim), scale_ = scale, refs_ = refs;
    memset(acc_, 0, sizeof(float) * padded_to(m_, kStripe) * height_);
    for (int r = 0, i = 0; r < rows; ++r)
      for (int g = 0; g < group; ++g, ++i) {
        place_[i] = (row + r) * heads + head + g;
        mass_[i] = mass + place_[i] * refs;
        for (int64_t record = 0; record < refs; ++record) mass_[i][record] = 0.f;
        base_[i] = -kInf, sum_[i] = 0.f;
        vector_[i] = q + r * stride[0] + g * stride[1];
      }
    for (int i = m_; i < padded(m_); ++i) base_[i] = -kInf, sum_[i] = 0.f;
    for (int first = 0; first < m_; first += kStripe)
      pack_pair_columns(vector_ + first, m_ - first < kStripe ? m_ - first : kStripe, dim_, this->q(first), kStripe);
  }

  // Takes a block of keys into the running softmax: vector i sees its first seen[i] keys, all where seen is null.
  void consume(TileRegisters& tiles, const KeyBlock<BF16>& block, const int* seen) {
    if (block.count == 0) return;
    pack_keys(block);
    pack_values(block);
    for (int first = 0; first < m_; first += kStripe) {
      alignas(64) int32_t visible[kStripe];
      const int n = m_ - first < kStripe ? m_ - first : kStripe;
      int most = 0;
      for (int i = 0; i < kStripe; ++i) {
        visible[i] = seen == nullptr ? block.count : seen[first + (i < n ? i : n - 1)];
        most = visible[i] > most ? visible[i] : most;
      }
      if (most == 0) continue;
      const int width = padded(n), keys = padded(most), pairs = pair_padded(most) / 2;
      tile_gemm<false>(tiles, k_, ld_, q(first), kStripe, keys, width, ld_, scores_, kStripe);
      for (int i = 0; i < width; i += kLanes) absorb(block, first + i, i, visible + i, most);
      tile_gemm<true>(tiles, v_, kBlock / 2, weights_, kStripe, height_, width, padded(pairs), acc(first), kStripe);
    }
  }

  // Writes the results of all vectors: out = acc / sum, lse, mass (in place). Nothing seen: 0, -inf, 0.
  void finish(BF16* out, float* lse) {
    for (int first = 0; first < m_; first += kLanes) {
      const int n = m_ - first < kLanes ? m_ - first : kLanes;
      const F32 sums = load(sum_ + first), inverse = select(sums == F32{}, F32{}, 1.f / sums);
      BF16* to[kLanes];
      for (int i = 0; i < n; ++i) {
        const int64_t at = place_[first + i];
        const float sum = sum_[first + i];
        to[i] = out + at * dim_;
        lse[at] = sum == 0.f ? -kInf : base_[first + i] * kLn2 + __builtin_logf(sum);
        scale_row(mass_[first + i], refs_, inverse[i]);
      }
      const float* from = column(acc(first), first);
      for (int d = 0; d < dim_; d += kPairRow, from += kPairRow * kStripe) {
        const int width = dim_ - d < kPairRow ? dim_ - d : kPairRow;
        F32 pairs[kLanes];
        for (int j = 0; j < kLanes; ++j) {
          const float* row = from + 2 * j * kStripe;
          const auto two = [&] { return make_pairs(load(row) * inverse, load(row + kStripe) * inverse); };
          pairs[j] = 2 * j < width ? reinterpret_cast<F32>(two()) : F32{};
        }
        transpose(pairs);
        for (int i = 0; i < n; ++i) {
          if (width == kPairRow)
            memcpy(to[i] + d, &pairs[i], sizeof(F32));
          else
            for (int e = 0; e < width; e += 8) memcpy(to[i] + d + e, reinterpret_cast<char*>(&pairs[i]) + 2 * e, 16);
        }
      }
    }
  }

 private:
  static constexpr float kLog2E = 1.44269504f, kLn2 = 0.693147181f;
  static constexpr int kRoom = kStripes * kStripe * 128;  // elements of all query vectors

  static int stripes(int dim) {
    const int most = kRoom / (pair_padded(dim) * kStripe);
    return most < kStripes ? most : kStripes;
  }
  static int padded_to(int n, int unit) { return (n + unit - 1) / unit * unit; }
  // The stripe that holds vector i, and its column there.
  uint32_t* q(int i) { return q_ + i / kStripe * kStripe * ld_; }
  float* acc(int i) { return acc_ + i / kStripe * kStripe * height_; }
  template <class Element>
  static Element* column(Element* stripe, int i) {
    return stripe + i % kStripe;
  }

  void pack_keys(const KeyBlock<BF16>& block) {
    for (int j = 0; j < block.count; ++j) copy_pairs(block.k[j], dim_, k_ + j * ld_);
    const int rest = padded(block.count) - block.count;
    memset(k_ + block.count * ld_, 0, sizeof(uint32_t) * rest * ld_);
  }

  // v_[d, j] = element d of values 2j and 2j + 1; zeros behind them, up to a multiple of 32 values. Eight elements at a
  // time: lane l of four has those of value 8 l + i before, and element i of values 8 l.. after three rounds of zips.
  void pack_values(const KeyBlock<BF16>& block) {
    alignas(64) static const BF16 zeros[kMaxDim] = {};
    for (int j = 0; j < block.count; j += kPairRow) {
      const BF16* row[kPairRow];
      for (int i = 0; i < kPairRow; ++i) row[i] = j + i < block.count ? block.v[j + i] : zeros;
      for (int d = 0; d < dim_; d += 8) {
        Row16 x[8], y[8];
#pragma GCC unroll 8
        for (int i = 0; i < 8; ++i) x[i] = four_pieces(row[i] + d, row[8 + i] + d, row[16 + i] + d, row[24 + i] + d);
        zip_pieces(x, y);
        zip_pieces(y, x);
        zip_pieces(x, y);
#pragma GCC unroll 8
        for (int i = 0; i < 8; ++i) memcpy(v_ + (d + i) * (kBlock / 2) + j / 2, &y[i], sizeof y[i]);
      }
    }
  }

  static Row16 four_pieces(const BF16* a, const BF16* b, const BF16* c, const BF16* d) {
    const auto piece = [](const BF16* p) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)); };
    __m512i row = _mm512_broadcast_i32x4(piece(a));
    row = _mm512_inserti32x4(row, piece(b), 1);
    row = _mm512_inserti32x4(row, piece(c), 2);
    return reinterpret_cast<Row16>(_mm512_inserti32x4(row, piece(d), 3));
  }

  // out[2 i], out[2 i + 1]: elements of x[i] and x[i + 4] in turn, of the lower and the upper half of each 16 bytes.
  // Three times in a row it transposes squares of eight.
  static void zip_pieces(const Row16* x, Row16* out) {
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      out[2 * i] = zip_half<0>(x[i], x[i + 4], typename MakeLanes<2 * kLanes>::type{});
      out[2 * i + 1] = zip_half<4>(x[i], x[i + 4], typename MakeLanes<2 * kLanes>::type{});
    }
  }
  template <int From, int... I>
  static Row16 zip_half(Row16 a, Row16 b, Lanes<I...>) {
    return __builtin_shufflevector(a, b, (I / 8 * 8 + From + I % 8 / 2 + I % 2 * 2 * kLanes)...);
  }

  // Scores of 16 vectors, at column `at`, become weights 2^(s - base). Bases are largest scores of an earlier block:
  // they stay until some weight outgrows them, so that sums need not fade at every block. Each lane has the same
  // operations whatever the others are.
  void absorb(const KeyBlock<BF16>& block, int first, int at, const int32_t* visible, int most) {
    float factor = scale_ * kLog2E;
    if (block.biased) {
      for (int j = 0; j < most; ++j) {
        float* s = scores_ + j * kStripe + at;
        store(s, load(s) * scale_ + block.bias[j]);
      }
      factor = kLog2E;
    }
    I32 seen;
    memcpy(&seen, visible, sizeof seen);
    F32 base = load(base_ + first), total;
    bool fits = !any(base == splat(-kInf));
    if (fits) {
      total = weigh(block, at, seen, most, factor, base);
      fits = !any(!(total <= splat(kOutgrown)));
    }
    if (!fits) {
      base = raise(first, at, seen, most, factor);
      total = weigh(block, at, seen, most, factor, base);
    }
    store(sum_ + first, load(sum_ + first) + total);
    if (block.run_count > 0) add_mass(block, first, at);
  }

  // Larger than the sum of a block's weights whose largest is 1.
  static constexpr float kOutgrown = 1024.f;

  static bool any(I32 mask) {
    return _mm512_test_epi32_mask(reinterpret_cast<__m512i>(mask), reinterpret_cast<__m512i>(mask)) != 0;
  }

  F32 weigh(const KeyBlock<BF16>& block, int at, I32 seen, int most, float factor, F32 base) {
    const bool all = !any(seen < (padded(most) - I32{})), keep = block.run_count > 0;
    if (keep && all) return weigh<false, true>(at, seen, most, factor, base);
    if (keep) return weigh<true, true>(at, seen, most, factor, base);
    if (all) return weigh<false, false>(at, seen, most, factor, base);
    return weigh<true, false>(at, seen, most, factor, base);
  }

  // Keep: the weights as floats, for add_mass. Not over the scores: they are needed again where weights outgrow the base.
  template <bool Masked, bool Keep>
  F32 weigh(int at, I32 seen, int most, float factor, F32 base) {
    const F32 shift = select(base == splat(-kInf), F32{}, -base);
    const int keys = padded(most);
    F32 even = {}, odd = {};
    int j = 0;
    for (; j < keys; j += 2) {
      const float* s = scores_ + j * kStripe + at;
      const F32 a = load(s) * factor + shift, b = load(s + kStripe) * factor + shift;
      F32 p, r;
      if constexpr (Masked)
        p = power_where(seen > j, a), r = power_where(seen > j + 1, b);
      else
        p = power(a), r = power(b);
      even += p, odd += r;
      if constexpr (Keep) store(kept_ + j * kStripe + at, p), store(kept_ + (j + 1) * kStripe + at, r);
      const U32 pairs = round_pairs(p, r);
      memcpy(weights_ + j / 2 * kStripe + at, &pairs, sizeof pairs);
    }
    for (; j < pair_padded(most); j += 2) memset(weights_ + j / 2 * kStripe + at, 0, sizeof(U32));
    return even + odd;
  }

  // Bases rise to the largest score; what was summed before fades.
  __attribute__((noinline)) F32 raise(int first, int at, I32 seen, int most, float factor) {
    const F32 before = load(base_ + first);
    F32 top = before;
    for (int j = 0; j < most; ++j)
      top = select(seen > j, max(load(scores_ + j * kStripe + at) * factor, top), top);
    store(base_ + first, top);
    if (any(before != splat(-kInf))) {
      const F32 fade = select(before == top, splat(1.f), power(before - top));
      float* a = column(acc(first), first);
      for (int d = 0; d < height_; ++d) store(a + d * kStripe, load(a + d * kStripe) * fade);
      store(sum_ + first, load(sum_ + first) * fade);
      for (int i = 0; i < kLanes && first + i < m_; ++i)
        if (fade[i] != 1.f) scale_row(mass_[first + i], refs_, fade[i]);
    }
    return top;
  }

  void add_mass(const KeyBlock<BF16>& block, int first, int at) {
    for (int r = 0; r < block.run_count; ++r) {
      const auto& run = block.runs[r];
      F32 total = {};
      for (int j = run.begin; j < run.end; ++j) total += load(kept_ + j * kStripe + at);
      for (int i = 0; i < kLanes && first + i < m_; ++i) mass_[first + i][run.record] += total[i];
    }
  }

  alignas(64) uint32_t q_[kRoom / 2];  // stripes [ld, 32], pairs of a vector's elements; not scaled: exact
  alignas(64) float acc_[kRoom];       // stripes [height, 32], sums of weights times values
  alignas(64) uint32_t k_[kBlock * kMaxDim / 2];  // [keys, ld]
  alignas(64) uint32_t v_[kMaxDim * kBlock / 2];  // [height, keys / 2]
  alignas(64) float scores_[kBlock * kStripe];
  alignas(64) float kept_[kBlock * kStripe];
  alignas(64) uint32_t weights_[kBlock / 2 * kStripe];
  float base_[kStripes * kStripe], sum_[kStripes * kStripe];
  float* mass_[kStripes * kStripe];  // of vector i: sums of weights per record
  const BF16* vector_[kStripes * kStripe];
  int64_t place_[kStripes * kStripe];  // which row of the results it is
  float scale_;
  int m_, dim_, ld_, height_;
  int64_t refs_;
};

#endif  // __AMX_BF16__

}  // namespace
}  // namespace M3_LEVEL
}  // namespace m3
