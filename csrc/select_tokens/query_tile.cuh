// One warp's share of select_tokens: 16 query vectors against the keys of a reference, up to 144 of them at a time with
// their scores in registers. Scores are in base 2 and lie transposed, keys down and queries across, so that a lane adds
// up what its keys receive without asking other lanes.
//
// In mma's layout a lane holds, of keys lane / 4 and lane / 4 + 8, the queries 2 (lane % 4) and the next of every 8.
#pragma once

#include "common/cuda/softmax_tile.cuh"

namespace m3::gpu {

// A reference of 128 tokens and a prefix of up to 16, as 72 registers of scores.
constexpr int kKeyTiles = 9;
constexpr int kChunk = kKeyTiles * kTileTokens;

typedef float ChunkScores[kKeyTiles][2][4];  // [tile][n][i]: key lane / 4 + i / 2 * 8, query 8 n + 2 (lane % 4) + i % 2

// What of a chunk a tile of queries sees.
struct Sight {
  int tiles;        // of keys, the others are not looked at
  int keys;         // of the chunk
  int query;        // the first query's row, counted from the chunk's first key
  int queries;      // rows of the tile that exist
  bool causal;

  M3_DEVICE bool partial(int tile) const {
    const int end = (tile + 1) * kTileTokens;
    return end > keys || (causal && end > query);
  }
  M3_DEVICE bool sees(int tile, int n, int i) const {
    const int key = tile * kTileTokens + score_row(i), row = query + score_token(n, i);
    return key < keys && !(causal && key > row);
  }
};

template <class T, int D>
struct QueryColumns {
  uint32_t b[D / 16][4];

  // From 16 rows in shared memory (tile_at).
  M3_DEVICE void load(const T* rows) {
    M3_UNROLL
    for (int k = 0; k < D / 16; ++k)
      load_matrices(b[k], rows + tile_at<D>(lane_index() % 8 + lane_index() / 16 * 8, 2 * k + lane_index() / 8 % 2));
  }

  // Scores against 16 keys in shared memory, -inf where a key is not seen.
  M3_DEVICE void scores(const T* keys, int tile, float scale, const Sight& sight, TileScores& s) const {
    M3_UNROLL
    for (int i = 0; i < 8; ++i) s[i / 4][i % 4] = 0.0f;
    M3_UNROLL
    for (int k = 0; k < D / 16; ++k) {
      uint32_t a[4];
      load_matrices(a, keys + tile * kTileTokens * D + tile_at<D>(lane_index() % 16, 2 * k + lane_index() / 16));
      mma<T>(s[0], a, b[k][0], b[k][1]);
      mma<T>(s[1], a, b[k][2], b[k][3]);
    }
    const bool partial = sight.partial(tile);
    M3_UNROLL
    for (int n = 0; n < 2; ++n) {
      M3_UNROLL
      for (int i = 0; i < 4; ++i) s[n][i] = partial && !sight.sees(tile, n, i) ? kMinusInfinity : s[n][i] * scale;
    }
  }
};

// Greatest and sum over the eight lanes that hold the same query.
M3_DEVICE float most_of_keys(float x) {
  M3_UNROLL
  for (int lanes = 4; lanes < 32; lanes *= 2) x = fmaxf(x, shuffle_xor(x, lanes));
  return x;
}
M3_DEVICE float sum_of_keys(float x) {
  M3_UNROLL
  for (int lanes = 4; lanes < 32; lanes *= 2) x += shuffle_xor(x, lanes);
  return x;
}

// The softmax over keys of a lane's four queries, [n][c]: query 8 n + 2 (lane % 4) + c.
struct QueryStatistics {
  float highest[2][2], sum[2][2];  // of this lane's keys, relative to `highest`

  M3_DEVICE void clear() {
    M3_UNROLL
    for (int q = 0; q < 4; ++q) highest[q / 2][q % 2] = kMinusInfinity, sum[q / 2][q % 2] = 0.0f;
  }

  // Takes a chunk's scores, which become weights relative to `highest`.
  M3_DEVICE void absorb(ChunkScores& s, int tiles) {
    M3_UNROLL
    for (int q = 0; q < 4; ++q) {
      const int n = q / 2, c = q % 2;
      float most = highest[n][c];
      M3_UNROLL
      for (int t = 0; t < kKeyTiles; ++t)
        if (t < tiles) most = fmaxf(most, fmaxf(s[t][n][c], s[t][n][c + 2]));
      most = most_of_keys(most);
      const float base = most == kMinusInfinity ? 0.0f : most;
      sum[n][c] *= exp2_fast(highest[n][c] - base);
      highest[n][c] = most;
    }
    weigh(s, tiles);
    M3_UNROLL
    for (int t = 0; t < kKeyTiles; ++t)
      if (t < tiles) {
        M3_UNROLL
        for (int q = 0; q < 4; ++q) sum[q / 2][q % 2] += s[t][q / 2][q % 2] + s[t][q / 2][q % 2 + 2];
      }
  }

  // Scores of a chunk to weights relative to `highest`.
  M3_DEVICE void weigh(ChunkScores& s, int tiles) const {
    M3_UNROLL
    for (int t = 0; t < kKeyTiles; ++t)
      if (t < tiles) {
        M3_UNROLL
        for (int n = 0; n < 2; ++n) {
          M3_UNROLL
          for (int i = 0; i < 4; ++i) {
            const float most = highest[n][i % 2];
            s[t][n][i] = exp2_fast(s[t][n][i] - (most == kMinusInfinity ? 0.0f : most));
          }
        }
      }
  }

  // What a weight is multiplied with to become a share: 0 for the rows of the tile that do not exist.
  M3_DEVICE void shares(int queries, float (&share)[2][2]) const {
    M3_UNROLL
    for (int q = 0; q < 4; ++q) {
      const float all = sum_of_keys(sum[q / 2][q % 2]);
      share[q / 2][q % 2] = score_token(q / 2, q % 2) < queries && all > 0.0f ? 1.0f / all : 0.0f;
    }
  }
};

}  // namespace m3::gpu
