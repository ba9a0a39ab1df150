// How a block of memory_decode goes through the tiles of its part: each warp takes every fourth one, and while it
// computes, the next one is on its way to its other stage.
#pragma once

#include "memory_decode/decode_block.cuh"

namespace m3::gpu {

template <int D>
constexpr int kStageElements = 2 * kTileTokens * D;  // keys and values

template <int D>
constexpr int kDecodeShared = (kTileRows * D + kDecodeWarps * kDecodeStages * kStageElements<D>) * 2;

// Attends to `tiles` tiles: start(tile, stage) begins the copies of a tile, mask(tile, scores) scales its products.
// Ends with all warps out of their stages.
template <class T, int D, class Start, class Mask>
M3_DEVICE void attend_tiles(const M3MemoryDecodeParams& p, const DecodeBlock& block, int tiles, const Start& start,
                            const Mask& mask, SoftmaxTile<T, D>& softmax) {
  T* queries = reinterpret_cast<T*>(shared_memory());
  T* stages = queries + kTileRows * D + warp_index() * kDecodeStages * kStageElements<D>;
  const auto copy = [&](int i) {
    const int tile = warp_index() + i * kDecodeWarps;
    if (tile < tiles) start(tile, stages + i % kDecodeStages * kStageElements<D>);
    commit_copies();
  };

  copy_queries<T, D>(p, block, queries);
  commit_copies();
  for (int i = 0; i < kDecodeStages - 1; ++i) copy(i);
  wait_copies<kDecodeStages - 1>();
  sync_block();
  QueryFragments<T, D> q;
  q.load(queries);

  for (int i = 0; warp_index() + i * kDecodeWarps < tiles; ++i) {
    copy(i + kDecodeStages - 1);
    wait_copies<kDecodeStages - 1>();
    sync_warp();
    const T* keys = stages + i % kDecodeStages * kStageElements<D>;
    TileScores s = {};
    q.scores(keys, s);
    mask(warp_index() + i * kDecodeWarps, s);
    softmax.absorb(s, keys + kTileTokens * D);
    sync_warp();
  }
  softmax.finish();
  sync_block();
}

}  // namespace m3::gpu
