// float32 as two 16-bit numbers, x = high + low up to about 2^-16 of x (2^-22 with float16): products of such pairs on
// tensor cores, leaving out low x low, are good to that.
#pragma once

#include "common/cuda/softmax_tile.cuh"
#include "common/cuda/words.cuh"

namespace m3::gpu {

struct Split {
  uint32_t high, low;  // two elements each
};

template <class T>
M3_DEVICE Split split(float first, float second) {
  const uint32_t high = pack<T>(first, second);
  return {high, pack<T>(first - low_of<T>(high), second - high_of<T>(high))};
}

// d += (a_high + a_low) (b_high + b_low)
template <class T>
M3_DEVICE void mma_split(float (&d)[4], const uint32_t (&a_high)[4], const uint32_t (&a_low)[4], Split b0, Split b1) {
  mma<T>(d, a_low, b0.high, b1.high);
  mma<T>(d, a_high, b0.low, b1.low);
  mma<T>(d, a_high, b0.high, b1.high);
}

// Rows [16, D] of float32 as two tiles in shared memory (tile_at).
template <class T, int D>
struct SplitRows {
  static constexpr int kElements = 2 * kTileRows * D;
  T* high;

  M3_DEVICE explicit SplitRows(T* first) : high(first) {}
  M3_DEVICE T* low() const { return high + kTileRows * D; }

  // Elements 2 pair and 2 pair + 1 of a row.
  M3_DEVICE void put(int row, int pair, float first, float second) const {
    const Split both = split<T>(first, second);
    const int at = tile_at<D>(row, pair / 4) + pair % 4 * 2;
    store_as(high + at, both.high);
    store_as(low() + at, both.low);
  }

  // Elements 4 quad to 4 quad + 3 of a row.
  M3_DEVICE void put4(int row, int quad, const float (&x)[4]) const {
    const Split left = split<T>(x[0], x[1]), right = split<T>(x[2], x[3]);
    const int at = tile_at<D>(row, quad / 2) + quad % 2 * 4;
    store8(high + at, left.high, right.high);
    store8(low() + at, left.low, right.low);
  }

  // As the left operand of mma: columns 16 k to 16 k + 15.
  M3_DEVICE void fragments(int k, uint32_t (&a_high)[4], uint32_t (&a_low)[4]) const {
    const int at = tile_at<D>(lane_index() % 16, 2 * k + lane_index() / 16);
    load_matrices(a_high, high + at);
    load_matrices(a_low, low() + at);
  }

  // s += these rows x keys^T
  M3_DEVICE void scores(const SplitRows& keys, TileScores& s) const {
    const int token = lane_index() % 8 + lane_index() / 16 * 8;
    M3_UNROLL
    for (int k = 0; k < D / 16; ++k) {
      uint32_t a_high[4], a_low[4], b_high[4], b_low[4];
      fragments(k, a_high, a_low);
      const int at = tile_at<D>(token, 2 * k + lane_index() / 8 % 2);
      load_matrices(b_high, keys.high + at);
      load_matrices(b_low, keys.low() + at);
      mma_split<T>(s[0], a_high, a_low, {b_high[0], b_low[0]}, {b_high[1], b_low[1]});
      mma_split<T>(s[1], a_high, a_low, {b_high[2], b_low[2]}, {b_high[3], b_low[3]});
    }
  }
};

}  // namespace m3::gpu
