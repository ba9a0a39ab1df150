// One warp's share of attention: 16 query vectors, their running softmax and their output, taking 16 tokens at a time
// from shared memory. Scores are in base 2.
//
// In mma's layout a lane holds, of rows lane / 4 and lane / 4 + 8, the columns 2 (lane % 4) and the next of every eight.
#pragma once

#include "common/cuda/device.cuh"

namespace m3::gpu {

constexpr int kTileTokens = 16;
constexpr int kTileRows = 16;
constexpr float kLog2e = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;
constexpr float kMinusInfinity = -__builtin_huge_valf();

// Rows of D elements in shared memory, without gaps: where piece `piece` (8 elements, 16 bytes) of row `row` lies, in
// elements. Pieces are exchanged inside of a row so that the eight rows ldmatrix reads together lie in different banks,
// while eight pieces written one after the other still fill one line of all banks.
template <int D>
M3_DEVICE int tile_at(int row, int piece) {
  static_assert(D % 64 == 0 || D == 80, "no exchange of pieces is known for this dimension");
  const int moved = D % 64 == 0 ? piece ^ (row & 7) : piece ^ (row >> 2 & 1);
  return row * D + moved * 8;
}

// The scores of 16 tokens: [n][i] is row lane / 4 + i / 2 * 8, token 8 n + 2 (lane % 4) + i % 2.
typedef float TileScores[2][4];

M3_DEVICE int score_row(int i) { return lane_index() / 4 + i / 2 * 8; }
M3_DEVICE int score_token(int n, int i) { return n * 8 + lane_index() % 4 * 2 + i % 2; }

template <class T, int D>
struct QueryFragments {
  uint32_t a[D / 16][4];

  // From 16 rows in shared memory (tile_at).
  M3_DEVICE void load(const T* rows) {
    M3_UNROLL
    for (int k = 0; k < D / 16; ++k)
      load_matrices(a[k], rows + tile_at<D>(lane_index() % 16, 2 * k + lane_index() / 16));
  }

  // s += q keys^T, keys 16 rows in shared memory.
  M3_DEVICE void scores(const T* keys, TileScores& s) const {
    const int token = lane_index() % 8 + lane_index() / 16 * 8;
    M3_UNROLL
    for (int k = 0; k < D / 16; ++k) {
      uint32_t b[4];
      load_matrices(b, keys + tile_at<D>(token, 2 * k + lane_index() / 8 % 2));
      mma<T>(s[0], a[k], b[0], b[1]);
      mma<T>(s[1], a[k], b[2], b[3]);
    }
  }
};

template <class T, int D>
struct SoftmaxTile {
  float out[D / 8][4] = {};                                // as scores: columns of D, not divided by the sum
  float highest[2] = {kMinusInfinity, kMinusInfinity};     // of rows lane / 4 and lane / 4 + 8
  float sum[2] = {0.0f, 0.0f};                             // of this lane's columns, relative to `highest`

  // Takes 16 tokens: their scores (-inf: not seen) and values, 16 rows, absent ones zero.
  M3_DEVICE void absorb(TileScores& s, const T* values) {
    M3_UNROLL
    for (int h = 0; h < 2; ++h) {
      float most = highest[h];
      M3_UNROLL
      for (int n = 0; n < 2; ++n) most = fmaxf(most, fmaxf(s[n][2 * h], s[n][2 * h + 1]));
      most = fmaxf(most, shuffle_xor(most, 1));
      most = fmaxf(most, shuffle_xor(most, 2));
      const float base = most == kMinusInfinity ? 0.0f : most;  // nothing seen yet: all weights become 0
      const float shrink = exp2_fast(highest[h] - base);
      highest[h] = most;
      sum[h] *= shrink;
      M3_UNROLL
      for (int n = 0; n < 2; ++n) {
        M3_UNROLL
        for (int i = 2 * h; i < 2 * h + 2; ++i) {
          s[n][i] = exp2_fast(s[n][i] - base);
          sum[h] += s[n][i];
        }
      }
      M3_UNROLL
      for (int n = 0; n < D / 8; ++n) out[n][2 * h] *= shrink, out[n][2 * h + 1] *= shrink;
    }
    // Scores lie as the left operand of the next product wants its elements.
    const uint32_t weights[4] = {pack<T>(s[0][0], s[0][1]), pack<T>(s[0][2], s[0][3]), pack<T>(s[1][0], s[1][1]),
                                 pack<T>(s[1][2], s[1][3])};
    M3_UNROLL
    for (int n = 0; n < D / 16; ++n) {
      uint32_t b[4];
      load_matrices_transposed(b, values + tile_at<D>(lane_index() % 16, 2 * n + lane_index() / 16));
      mma<T>(out[2 * n], weights, b[0], b[1]);
      mma<T>(out[2 * n + 1], weights, b[2], b[3]);
    }
  }

  // Afterwards `sum` covers all columns of a row.
  M3_DEVICE void finish() {
    M3_UNROLL
    for (int h = 0; h < 2; ++h) {
      sum[h] += shuffle_xor(sum[h], 1);
      sum[h] += shuffle_xor(sum[h], 2);
    }
  }
};

}  // namespace m3::gpu
