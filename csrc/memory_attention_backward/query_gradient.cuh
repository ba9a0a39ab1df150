// The first kernel of memory_attention_backward: grad_q, by the tiles of the forward, and on its way the correction
// grad_lse - grad_out . out of every row, which the next kernel reads.
#pragma once

#include "memory_attention/attention_launch.cuh"
#include "memory_attention_backward/gradient_tile.cuh"

namespace m3::gpu {

// Query vectors of a block: a warp has 16, whose q and grad_out it keeps in registers.
constexpr int kGradientRows = kAttentionWarps * kTileRows;

template <int D>
constexpr int kQueryGradientShared = 2 * kGradientRows * D * 2 + kStageBytes<D>;

// x . y of row lane_index() % 16 of two tiles in shared memory; two lanes share a row.
template <class T, int D>
M3_DEVICE float row_product(const T* x, const T* y) {
  float sum = 0.0f;
  M3_UNROLL
  for (int i = 0; i < D / 16; ++i) {
    const int at = tile_at<D>(lane_index() % 16, 2 * i + lane_index() / 16);
    float a[4], b[4];
    load16(a, reinterpret_cast<const float*>(x + at));
    load16(b, reinterpret_cast<const float*>(y + at));
    M3_UNROLL
    for (int j = 0; j < 4; ++j) {
      const uint32_t m = to_bits(a[j]), n = to_bits(b[j]);
      sum += low_of<T>(m) * low_of<T>(n) + high_of<T>(m) * high_of<T>(n);
    }
  }
  return sum + shuffle_xor(sum, 16);
}

template <class T, int D>
M3_KERNEL void M3_THREADS(kAttentionThreads, 2)
    attention_query_gradient(M3MemoryAttentionBackwardParams params, GradientWorkspace work, int tiles) {
  const M3MemoryAttentionParams& p = params.forward;
  const ChunkBlock block(p, tiles);
  const ChunkRows rows(p, block.chunk, block.head, block.tile * kGradientRows);
  if (!rows.has(0)) return;
  const SequenceRows sequence(p, sequence_of(p.cu_q, p.sequences, rows.first_row));
  const int last = min_of(rows.vectors - rows.first_vector, kGradientRows) - 1;

  const int first = warp_index() * kTileRows, own = first + lane_index() % kTileRows;  // vectors of the tile
  T* mine = reinterpret_cast<T*>(shared_memory()) + 2 * first * D;  // this warp's q, then its grad_out
  T* mine_g = mine + kTileRows * D;
  char* stages = shared_memory() + 2 * kGradientRows * D * 2;
  T* out = reinterpret_cast<T*>(stages) + kStageElements<D> + first * D;  // in the stage that is filled second
  static_assert(kStageElements<D> == kGradientRows * D);
  const int64_t place = rows.has(own) ? rows.place(p, own) : -1;
  const int64_t q_at = place < 0 ? -1 : place / p.heads * p.q_stride[0] + place % p.heads * p.q_stride[1];
  const auto contiguous = [&](int r) { return shuffle(place < 0 ? int64_t{-1} : place * D, r); };
  copy_rows<D, kTileRows>(static_cast<const T*>(p.q), mine, 0, [&](int r) { return shuffle(q_at, r); });
  copy_rows<D, kTileRows>(static_cast<const T*>(params.grad_out), mine_g, 0, contiguous);
  copy_rows<D, kTileRows>(static_cast<const T*>(p.out), out, 0, contiguous);
  commit_copies();
  TokenTiles<T, D> tokens(p, rows, sequence.first_key, sequence.visible(rows.row(last)), stages);
  wait_copies<0>();
  sync_warp();

  float own_lse = -kMinusInfinity, own_correction = 0.0f;
  const float product = row_product<T, D>(mine_g, out);
  if (place >= 0) {
    own_lse = base2_of(p.lse[place]);
    own_correction = params.grad_lse[place] - product;
    if (lane_index() < kTileRows) work.correction[place] = own_correction;
  }
  QueryFragments<T, D> q, g;
  q.load(mine);
  g.load(mine_g);
  float lse[2], correction[2];
  int visible[2];
  M3_UNROLL
  for (int h = 0; h < 2; ++h) {
    const int row = score_row(2 * h);
    lse[h] = shuffle(own_lse, row), correction[h] = shuffle(own_correction, row);
    visible[h] = rows.has(first + row) ? sequence.visible(rows.row(first + row)) : 0;
  }
  const bool working = rows.has(first);
  const int most = working ? sequence.visible(rows.row(min_of(first + kTileRows - 1, last))) : 0;

  float acc[D / 8][4] = {};
  const float scale = p.scale * kLog2e;
  for (int i = 0; tokens.next(i); ++i) {
    const bool memory = tokens.is_memory(i);
    if (!working || (!memory && tokens.first(i) >= most)) continue;
    M3_UNROLL
    for (int half = 0; half < kTokens; half += kTileTokens) {
      const int keys = tokens.keys_at(i) + half * D;
      TileScores s = {}, ds = {};
      add_scores(q, tokens.stages, keys, s);
      add_scores(g, tokens.stages, tokens.values_at(i) + half * D, ds);
      M3_UNROLL
      for (int n = 0; n < 2; ++n) {
        M3_UNROLL
        for (int j = 0; j < 4; ++j) {
          const int token = half + score_token(n, j);
          const bool seen = memory || tokens.first(i) + token < visible[j / 2];
          const float bias = !seen ? kMinusInfinity : memory ? tokens.bias(i)[token] : 0.0f;
          const float score = bias == kMinusInfinity ? kMinusInfinity : s[n][j] * scale + bias;
          ds[n][j] = score_gradient(probability(score, lse[j / 2]), ds[n][j], correction[j / 2]);
        }
      }
      add_product<T, D>(ds, tokens.stages, keys, acc);
    }
  }
  if (!working) return;
  scale_rows<D>(acc, p.scale);
  sync_warp();
  put_rows<T, D>(acc, mine);
  sync_warp();
  store_rows<D, kTileRows>(mine, 0, static_cast<T*>(params.grad_q), contiguous);
}

}  // namespace m3::gpu
