// The second kernel of memory_attention_backward: a block owns 64 keys of one KV head, of a sequence's context or of a
// chunk's memory tokens, and goes through all query vectors that see them. Gradients of the context are final; those of
// memory tokens are this chunk's share, which the last kernel adds up by slot.
#pragma once

#include "memory_attention_backward/vector_tiles.cuh"

namespace m3::gpu {

constexpr int kBlockKeys = kAttentionWarps * kTileRows;  // a warp has 16

template <int D>
constexpr int kKeyGradientShared = 2 * kBlockKeys * D * 2 + kVectorStageBytes<D>;

struct KeyGradientGrid {
  int64_t context_blocks;     // they come first
  int32_t context_tiles;      // of a sequence
  int32_t memory_tiles;       // of a chunk
};

// One warp's keys: sums over the query vectors. Up to D = 80 keys and values stay in registers, next to the sums.
template <class T, int D>
struct KeySums {
  static constexpr bool kHeld = D <= 80;
  QueryFragments<T, D> keys, values;
  const T* rows;  // keys, then values, 16 each, in shared memory
  float k[D / 8][4] = {}, v[D / 8][4] = {};  // without the factor `scale`
  float bias[2] = {0.0f, 0.0f};              // of this lane's columns

  // Takes tile i; this warp's keys begin at key `first` of the block, `added` is their bias in base 2 (memory tokens
  // only).
  template <bool Memory, class Tiles>
  M3_DEVICE void take(const Tiles& tiles, int i, int first, const float (&added)[2], float scale) {
    M3_UNROLL
    for (int half = 0; half < kVectors; half += kTileTokens) {
      const int q = tiles.queries_at(i) + half * D, g = tiles.gradients_at(i) + half * D;
      TileScores p = {}, ds = {};
      if constexpr (kHeld) {
        add_scores(keys, tiles.stages, q, p);
        add_scores(values, tiles.stages, g, ds);
      } else {
        add_scores<T, D>(rows, tiles.stages, q, p);
        add_scores<T, D>(rows + kTileRows * D, tiles.stages, g, ds);
      }
      M3_UNROLL
      for (int n = 0; n < 2; ++n) {
        M3_UNROLL
        for (int j = 0; j < 4; ++j) {
          const int vector = half + score_token(n, j), key = first + score_row(j);
          const bool sees = key < static_cast<int>(to_bits(tiles.seen(i)[vector]));
          const float score = sees ? p[n][j] * scale + (Memory ? added[j / 2] : 0.0f) : kMinusInfinity;
          p[n][j] = probability(score, tiles.lse(i)[vector]);
          ds[n][j] = score_gradient(p[n][j], ds[n][j], tiles.correction(i)[vector]);
          if constexpr (Memory) bias[j / 2] += ds[n][j];
        }
      }
      add_product<T, D>(p, tiles.stages, g, v);
      add_product<T, D>(ds, tiles.stages, q, k);
    }
  }
};

// What a block owns: keys `first`.. of a sequence, or memory tokens `first`.. of a chunk.
struct KeyBlock {
  bool memory;
  int64_t owner;  // sequence or chunk
  int head, first;

  M3_DEVICE KeyBlock(const M3MemoryAttentionParams& p, const KeyGradientGrid& grid) {
    int64_t at = block_index();
    memory = at >= grid.context_blocks;
    if (memory) at -= grid.context_blocks;
    const int tiles = memory ? grid.memory_tiles : grid.context_tiles;
    first = static_cast<int>(at % tiles) * kBlockKeys;
    head = static_cast<int>(at / tiles % p.kv_heads);
    owner = at / tiles / p.kv_heads;
  }
};

// This lane's row (key lane_index() % 16 of the warp): where it begins in k and in v, -1: there is no such key.
struct OwnKey {
  int64_t k = -1, v = -1;
};

template <class T, int D>
M3_DEVICE void load_keys(const T* k, const T* v, const OwnKey& own, T* mine, KeySums<T, D>& sums) {
  copy_rows<D, kTileRows>(k, mine, 0, [&](int r) { return shuffle(own.k, r); });
  copy_rows<D, kTileRows>(v, mine + kTileRows * D, 0, [&](int r) { return shuffle(own.v, r); });
  commit_copies();
  wait_copies<0>();
  sync_warp();
  sums.rows = mine;
  if constexpr (KeySums<T, D>::kHeld) {
    sums.keys.load(mine);
    sums.values.load(mine + kTileRows * D);
  }
}

template <class T, int D>
M3_DEVICE void context_gradient(const M3MemoryAttentionBackwardParams& params, const GradientWorkspace& work,
                                const KeyBlock& block, char* shared) {
  const M3MemoryAttentionParams& p = params.forward;
  const SequenceRows sequence(p, block.owner);
  if (block.first >= sequence.keys) return;
  T* mine = reinterpret_cast<T*>(shared) + warp_index() * 2 * kTileRows * D;
  const int first = warp_index() * kTileRows;
  const auto row_of = [&](const SequenceRows& in, int lane) {  // of a lane's key, in k
    const int key = block.first + first + lane % kTileRows;
    return key < in.keys ? int64_t{in.first_key} + key : -1;
  };
  OwnKey at;
  if (const int64_t row = row_of(sequence, lane_index()); row >= 0) {
    at.k = row * p.k_stride[0] + block.head * p.k_stride[1];
    at.v = row * p.v_stride[0] + block.head * p.v_stride[1];
  }
  KeySums<T, D> sums;
  load_keys(static_cast<const T*>(p.k), static_cast<const T*>(p.v), at, mine, sums);

  const int group = static_cast<int>(p.heads / p.kv_heads), hidden = block.first - (sequence.keys - sequence.rows);
  const int shift = 1 - hidden - sequence.first;
  const auto visible = [shift](int row) { return row + shift; };  // at most the keys there are
  VectorTiles<T, D, decltype(visible)> tiles(params, work.correction, sequence.first, block.head,
                                             (hidden > 0 ? hidden : 0) * group, sequence.rows * group, visible,
                                             shared + 2 * kBlockKeys * D * 2);
  const float none[2] = {0.0f, 0.0f}, scale = p.scale * kLog2e;
  for (int i = 0; tiles.next(i); ++i)
    if (first < tiles.most(i)) sums.template take<false>(tiles, i, first, none, scale);

  scale_rows<D>(sums.k, p.scale);
  sync_warp();
  put_rows<T, D>(sums.k, mine);
  put_rows<T, D>(sums.v, mine + kTileRows * D);
  sync_warp();
  const int64_t row = row_of(SequenceRows(p, block.owner), lane_anew());
  const auto to = [&](int r) { return shuffle(row < 0 ? int64_t{-1} : (row * p.kv_heads + block.head) * D, r); };
  store_rows<D, kTileRows>(mine, 0, static_cast<T*>(params.grad_k), to);
  store_rows<D, kTileRows>(mine + kTileRows * D, 0, static_cast<T*>(params.grad_v), to);
}

template <class T, int D>
M3_DEVICE void record_share(const M3MemoryAttentionBackwardParams& params, const GradientWorkspace& work,
                            const KeyBlock& block, char* shared) {
  const M3MemoryAttentionParams& p = params.forward;
  const M3Records& memory = p.memory;
  const int from = record_head(memory, block.head);
  const ChunkRows rows(p, block.owner, block.head, 0);
  if (from < 0 || rows.vectors == 0) return;
  T* mine = reinterpret_cast<T*>(shared) + warp_index() * 2 * kTileRows * D;
  const int first = warp_index() * kTileRows;
  const auto token_of = [&](int lane) {
    return memory_token(memory, block.owner, from, block.first + first + lane % kTileRows);
  };
  const MemoryToken own = token_of(lane_index());
  OwnKey at;
  if (own.slot >= 0) {
    at.k = own.slot * memory.k_stride[0] + from * memory.k_stride[1] + own.position * memory.k_stride[2];
    at.v = own.slot * memory.v_stride[0] + from * memory.v_stride[1] + own.position * memory.v_stride[2];
  }
  KeySums<T, D> sums;
  load_keys(static_cast<const T*>(memory.k), static_cast<const T*>(memory.v), at, mine, sums);

  const auto visible = [](int) { return kBlockKeys; };
  VectorTiles<T, D, decltype(visible)> tiles(params, work.correction, rows.first_row, block.head, 0, rows.vectors,
                                             visible, shared + 2 * kBlockKeys * D * 2);
  const float own_bias = token_bias(memory, own, from), scale = p.scale * kLog2e;
  const float added[2] = {shuffle(own_bias, score_row(0)), shuffle(own_bias, score_row(2))};
  const bool any = ballot(own.slot >= 0) != 0;
  for (int i = 0; tiles.next(i); ++i)
    if (any) sums.template take<true>(tiles, i, first, added, scale);

  scale_rows<D>(sums.k, p.scale);
  const uint32_t present = ballot(token_of(lane_anew()).slot >= 0);
  const int64_t all = (block.owner * p.kv_heads + block.head) * memory.refs * memory.tokens;
  const int64_t token = all + block.first + first;
  M3_UNROLL
  for (int h = 0; h < 2; ++h) {
    const int row = score_row(2 * h);
    float sum = sums.bias[h];
    sum += shuffle_xor(sum, 1);
    sum += shuffle_xor(sum, 2);
    if (!(present >> row & 1)) continue;
    if (lane_index() % 4 == 0) work.record_bias[token + row] = sum;
    M3_UNROLL
    for (int n = 0; n < D / 8; ++n) {
      const int64_t to = (token + row) * D + score_token(n, 0);
      store8(work.record_k + to, to_bits(sums.k[n][2 * h]), to_bits(sums.k[n][2 * h + 1]));
      store8(work.record_v + to, to_bits(sums.v[n][2 * h]), to_bits(sums.v[n][2 * h + 1]));
    }
  }
}

template <class T, int D>
M3_KERNEL void M3_THREADS(kAttentionThreads, 2)
    attention_key_gradient(M3MemoryAttentionBackwardParams params, GradientWorkspace work, KeyGradientGrid grid) {
  const KeyBlock block(params.forward, grid);
  if (block.memory)
    record_share<T, D>(params, work, block, shared_memory());
  else
    context_gradient<T, D>(params, work, block, shared_memory());
}

}  // namespace m3::gpu
