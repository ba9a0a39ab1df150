// What the keys of a chunk have received, one warp's part: sums of shares, or of exponentials with their maximum. A
// lane holds keys lane / 4 and lane / 4 + 8 of every 16, for its own queries; lanes meet when a chunk is put down.
#pragma once

#include "select_tokens/query_tile.cuh"

namespace m3::gpu {

// received and causal: w_j = sum of softmax shares.
struct ReceivedShares {
  static constexpr int kArrays = 1;  // of columns in shared memory
  float sum[kKeyTiles][2];

  M3_DEVICE void clear() {
    M3_UNROLL
    for (int t = 0; t < kKeyTiles; ++t) sum[t][0] = sum[t][1] = 0.0f;
  }
  M3_DEVICE static void begin(float* columns, int64_t count) {
    for (int64_t j = lane_index(); j < count; j += 32) columns[j] = 0.0f;
  }

  M3_DEVICE void add(const ChunkScores& weights, int tiles, const float (&share)[2][2]) {
    M3_UNROLL
    for (int t = 0; t < kKeyTiles; ++t)
      if (t < tiles) {
        M3_UNROLL
        for (int i = 0; i < 4; ++i)
          sum[t][i / 2] += weights[t][0][i] * share[0][i % 2] + weights[t][1][i] * share[1][i % 2];
      }
  }

  // Adds to the warp's columns, `count` per array, from `first` on.
  M3_DEVICE void put_down(float* columns, int64_t, int64_t first, int tiles) const {
    M3_UNROLL
    for (int t = 0; t < kKeyTiles; ++t)
      if (t < tiles) {
        M3_UNROLL
        for (int h = 0; h < 2; ++h) {
          float all = sum[t][h];
          all += shuffle_xor(all, 1);
          all += shuffle_xor(all, 2);
          if (lane_index() % 4 == 0) columns[first + t * kTileTokens + lane_index() / 4 + 8 * h] += all;
        }
      }
  }

  // The weight of key j, from the columns of all warps.
  M3_DEVICE static float weight(const float* columns, int64_t count, int warps, int64_t j) {
    float all = 0.0f;
    for (int w = 0; w < warps; ++w) all += columns[w * count + j];
    return all;
  }
};

// exp: w_j = log2 of a sum of exponentials, as its greatest exponent and the sum relative to that.
struct ReceivedExponentials {
  static constexpr int kArrays = 2;
  float highest[kKeyTiles][2], sum[kKeyTiles][2];

  M3_DEVICE void clear() {
    M3_UNROLL
    for (int t = 0; t < kKeyTiles; ++t)
      highest[t][0] = highest[t][1] = kMinusInfinity, sum[t][0] = sum[t][1] = 0.0f;
  }
  M3_DEVICE static void begin(float* columns, int64_t count) {
    for (int64_t j = lane_index(); j < count; j += 32) columns[j] = kMinusInfinity, columns[count + j] = 0.0f;
  }

  M3_DEVICE static void join(float& highest, float& sum, float other, float more) {
    const float most = fmaxf(highest, other), base = most == kMinusInfinity ? 0.0f : most;
    sum = sum * exp2_fast(highest - base) + more * exp2_fast(other - base);
    highest = most;
  }

  // A tile of 16 keys against the queries that exist.
  M3_DEVICE void add(const TileScores& s, int t, int queries) {
    M3_UNROLL
    for (int h = 0; h < 2; ++h) {
      float x[4];
      M3_UNROLL
      for (int q = 0; q < 4; ++q)
        x[q] = score_token(q / 2, q % 2) < queries ? s[q / 2][2 * h + q % 2] : kMinusInfinity;
      const float most = fmaxf(highest[t][h], fmaxf(fmaxf(x[0], x[1]), fmaxf(x[2], x[3])));
      const float base = most == kMinusInfinity ? 0.0f : most;
      sum[t][h] *= exp2_fast(highest[t][h] - base);
      M3_UNROLL
      for (int q = 0; q < 4; ++q) sum[t][h] += exp2_fast(x[q] - base);
      highest[t][h] = most;
    }
  }

  M3_DEVICE void put_down(float* columns, int64_t count, int64_t first, int tiles) const {
    M3_UNROLL
    for (int t = 0; t < kKeyTiles; ++t)
      if (t < tiles) {
        M3_UNROLL
        for (int h = 0; h < 2; ++h) {
          float most = highest[t][h], all = sum[t][h];
          M3_UNROLL
          for (int lanes = 1; lanes < 4; lanes *= 2)
            join(most, all, shuffle_xor(most, lanes), shuffle_xor(all, lanes));
          if (lane_index() % 4 == 0) {
            float* at = columns + first + t * kTileTokens + lane_index() / 4 + 8 * h;
            join(at[0], at[count], most, all);
          }
        }
      }
  }

  M3_DEVICE static float weight(const float* columns, int64_t count, int warps, int64_t j) {
    float most = kMinusInfinity, all = 0.0f;
    for (int w = 0; w < warps; ++w) join(most, all, columns[2 * w * count + j], columns[(2 * w + 1) * count + j]);
    return most + log2_fast(all);
  }
};

}  // namespace m3::gpu
