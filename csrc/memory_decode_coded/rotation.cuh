// The two rotations of memory_decode_coded, once per block each, by all of its warps. Rotation matrices are read from
// global memory as the products want them: every 32 bytes that are asked for are used.
#pragma once

#include "memory_decode/decode_join.cuh"
#include "memory_decode_coded/split.cuh"

namespace m3::gpu {

// q = rot q for the 16 query vectors in q.high (plain elements). Without rotation only the low halves are set, to zero.
template <class T, int D>
M3_DEVICE void rotate_queries(const float* rot, const SplitRows<T, D>& q) {
  if (!rot) {
    for (int i = thread_index(); i < kTileRows * D / 2; i += kDecodeThreads) store_as(q.low() + 2 * i, uint32_t{0});
    sync_block();
    return;
  }
  QueryFragments<T, D> plain;
  plain.load(q.high);
  sync_block();  // all warps have read before one writes
  for (int n = warp_index(); n < D / 8; n += kDecodeWarps) {
    const float* row = rot + (n * 8 + lane_index() / 4) * D + lane_index() % 4 * 2;
    float turned[4] = {};
    M3_UNROLL
    for (int k = 0; k < D / 16; ++k) {
      const auto low = load_as<Group<float, 2>>(row + k * 16), high = load_as<Group<float, 2>>(row + k * 16 + 8);
      const Split b0 = split<T>(low.at[0], low.at[1]), b1 = split<T>(high.at[0], high.at[1]);
      mma<T>(turned, plain.a[k], b0.low, b1.low);
      mma<T>(turned, plain.a[k], b0.high, b1.high);
    }
    M3_UNROLL
    for (int h = 0; h < 2; ++h)
      q.put(score_row(2 * h), n * 4 + lane_index() % 4, turned[2 * h], turned[2 * h + 1]);
  }
  sync_block();
}

// rows = what the warps have found for the first `count` vectors, joined; zeros behind them.
template <class T, int D>
M3_DEVICE void join_rows(const Join<D>& join, int count, const SplitRows<T, D>& rows) {
  for (int piece = thread_index(); piece < kTileRows * D / 4; piece += kDecodeThreads) {
    const int row = piece / (D / 4), column = piece % (D / 4) * 4;
    float factor[kDecodeWarps], value[4] = {};
    if (row < count) {
      join.weights(row, factor);
      join.read(row, column, factor, value);
    }
    rows.put4(row, column / 4, value);
  }
  sync_block();
}

// The rows times rot: store(h, column, two values) gets those of row score_row(2 h).
template <class T, int D, class Store>
M3_DEVICE void rotate_back(const float* rot, const SplitRows<T, D>& rows, const Store& store) {
  for (int n = warp_index(); n < D / 8; n += kDecodeWarps) {
    const float* column = rot + lane_index() % 4 * 2 * D + n * 8 + lane_index() / 4;
    float turned[4] = {};
    M3_UNROLL
    for (int k = 0; k < D / 16; ++k) {
      uint32_t a_high[4], a_low[4];
      rows.fragments(k, a_high, a_low);
      const float* at = column + k * 16 * D;
      mma_split<T>(turned, a_high, a_low, split<T>(at[0], at[D]), split<T>(at[8 * D], at[9 * D]));
    }
    M3_UNROLL
    for (int h = 0; h < 2; ++h)
      store(h, n * 8 + lane_index() % 4 * 2, Group<float, 2>{{turned[2 * h], turned[2 * h + 1]}});
  }
}

}  // namespace m3::gpu
