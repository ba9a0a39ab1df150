// One warp's share of memory_attention: 32 query vectors as two row tiles of mma, so that every fragment of keys and
// values is read from shared memory once for both, and their running softmax over 32 tokens at a time. Scores are in
// base 2.
#pragma once

#include "memory_attention/token_tiles.cuh"

namespace m3::gpu {

constexpr int kWarpRows = 32;
constexpr int kBlockRows = kAttentionWarps * kWarpRows;

// [m][n][i]: vector 16 m + score_row(i), token score_token(n, i).
typedef float WarpScores[2][kTokens / 8][4];

// Of values per row in mma's layout ([m][h]: vector 16 m + 8 h + lane / 4), the one of vector lane_index().
M3_DEVICE float of_own_row(const float (&x)[2][2]) {
  float mine = 0.0f;
  M3_UNROLL
  for (int i = 0; i < 4; ++i) {
    const float value = shuffle(x[i / 2][i % 2], lane_index() % 8 * 4);
    if (lane_index() / 8 == i) mine = value;
  }
  return mine;
}

// The warp's query vectors. Up to D = 80 they stay in registers, so that their place in shared memory is free again.
template <class T, int D>
struct WarpQueries {
  static constexpr bool kHeld = D <= 80;
  uint32_t held[kHeld ? D / 16 : 1][2][4];
  const T* rows;  // 32 in shared memory

  M3_DEVICE explicit WarpQueries(const T* in_shared) : rows(in_shared) {
    if constexpr (kHeld) {
      M3_UNROLL
      for (int k = 0; k < D / 16; ++k) load(k, held[k]);
    }
  }

  // s = queries keys^T; the keys are `offset` elements behind `tiles`.
  M3_DEVICE void scores(const T* tiles, int offset, WarpScores& s) const {
    const int at = offset + tile_at<D>(lane_index() % 8 + lane_index() / 16 * 8, lane_index() / 8 % 2);
    M3_UNROLL
    for (int k = 0; k < D / 16; ++k) {
      uint32_t a[2][4];
      if constexpr (!kHeld) {
        load(k, a);
      } else {
        M3_UNROLL
        for (int i = 0; i < 8; ++i) a[i / 4][i % 4] = held[k][i / 4][i % 4];
      }
      M3_UNROLL
      for (int n = 0; n < kTokens / 16; ++n) {
        uint32_t b[4];
        load_matrices(b, tiles + fragment_at<D>(at, k) + n * 16 * D);
        M3_UNROLL
        for (int m = 0; m < 2; ++m) {
          mma<T>(s[m][2 * n], a[m], b[0], b[1]);
          mma<T>(s[m][2 * n + 1], a[m], b[2], b[3]);
        }
      }
    }
  }

 private:
  M3_DEVICE void load(int k, uint32_t (&a)[2][4]) const {
    const int at = tile_at<D>(lane_index() % 16, lane_index() / 16);
    M3_UNROLL
    for (int m = 0; m < 2; ++m) load_matrices(a[m], rows + fragment_at<D>(at, k) + m * 16 * D);
  }
};

template <class T, int D>
struct WarpSoftmax {
  float out[2][D / 8][4] = {};  // not divided by the sum
  float highest[2][2], sum[2][2] = {};  // `sum`: of this lane's columns, relative to `highest`

  M3_DEVICE WarpSoftmax() {
    M3_UNROLL
    for (int i = 0; i < 4; ++i) highest[i / 2][i % 2] = kMinusInfinity;
  }

  // Turns the scores of 32 tokens (-inf: not seen) into weights relative to the new `highest`.
  M3_DEVICE void weigh(WarpScores& s) {
    float shrink[2][2];
    bool grown = false;
    M3_UNROLL
    for (int m = 0; m < 2; ++m) {
      M3_UNROLL
      for (int h = 0; h < 2; ++h) {
        float most = highest[m][h];
        M3_UNROLL
        for (int n = 0; n < kTokens / 8; ++n) most = fmaxf(most, fmaxf(s[m][n][2 * h], s[m][n][2 * h + 1]));
        most = fmaxf(most, shuffle_xor(most, 1));
        most = fmaxf(most, shuffle_xor(most, 2));
        const float base = most == kMinusInfinity ? 0.0f : most;  // nothing seen yet: all weights become 0
        shrink[m][h] = exp2_fast(highest[m][h] - base);
        grown = grown || most > highest[m][h];
        highest[m][h] = most;
        sum[m][h] *= shrink[m][h];
        M3_UNROLL
        for (int n = 0; n < kTokens / 8; ++n) {
          M3_UNROLL
          for (int i = 2 * h; i < 2 * h + 2; ++i) {
            s[m][n][i] = exp2_fast(s[m][n][i] - base);
            sum[m][h] += s[m][n][i];
          }
        }
      }
    }
    // After the first few tiles a row's highest score rarely changes.
    if (ballot(grown) == 0) return;
    M3_UNROLL
    for (int m = 0; m < 2; ++m) {
      M3_UNROLL
      for (int n = 0; n < D / 8; ++n) {
        M3_UNROLL
        for (int i = 0; i < 4; ++i) out[m][n][i] *= shrink[m][i / 2];
      }
    }
  }

  // out += weights values; the values are `offset` elements behind `tiles`.
  M3_DEVICE void add(const WarpScores& weights, const T* tiles, int offset) {
    const int at = offset + tile_at<D>(lane_index() % 16, lane_index() / 16);
    M3_UNROLL
    for (int k = 0; k < kTokens / 16; ++k) {
      // Scores lie as the left operand of this product wants its elements.
      uint32_t a[2][4];
      M3_UNROLL
      for (int m = 0; m < 2; ++m) {
        M3_UNROLL
        for (int i = 0; i < 4; ++i)
          a[m][i] = pack<T>(weights[m][2 * k + i / 2][i % 2 * 2], weights[m][2 * k + i / 2][i % 2 * 2 + 1]);
      }
      M3_UNROLL
      for (int n = 0; n < D / 16; ++n) {
        uint32_t b[4];
        load_matrices_transposed(b, tiles + fragment_at<D>(at, n) + k * 16 * D);
        M3_UNROLL
        for (int m = 0; m < 2; ++m) {
          mma<T>(out[m][2 * n], a[m], b[0], b[1]);
          mma<T>(out[m][2 * n + 1], a[m], b[2], b[3]);
        }
      }
    }
  }

  // Divides by the sums; gives every row's log-sum-exp in base 2.
  M3_DEVICE void finish(float (&lse)[2][2]) {
    M3_UNROLL
    for (int m = 0; m < 2; ++m) {
      M3_UNROLL
      for (int h = 0; h < 2; ++h) {
        float total = sum[m][h];
        total += shuffle_xor(total, 1);
        total += shuffle_xor(total, 2);
        lse[m][h] = total > 0.0f ? highest[m][h] + log2_fast(total) : kMinusInfinity;
        const float factor = total > 0.0f ? 1.0f / total : 0.0f;
        M3_UNROLL
        for (int n = 0; n < D / 8; ++n) out[m][n][2 * h] *= factor, out[m][n][2 * h + 1] *= factor;
      }
    }
  }
};

}  // namespace m3::gpu
