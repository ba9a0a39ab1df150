// What the launchers of memory_attention and its gradient share: checks of the operands, and how blocks are numbered
// where a block has a tile of query vectors of a chunk.
#pragma once

#include "common/cuda/shapes.cuh"
#include "memory_attention/chunk_rows.cuh"

namespace m3::gpu {

// Every chunk has as many tiles as the longest could have.
inline int64_t chunk_tiles(const M3MemoryAttentionParams& p, int64_t tile_rows) {
  return (p.max_chunk * (p.heads / p.kv_heads) + tile_rows - 1) / tile_rows;
}

inline int64_t chunk_blocks(const M3MemoryAttentionParams& p, int64_t tiles) {
  return p.rows > 0 ? p.memory.chunks * p.kv_heads * tiles : 0;
}

// Tiles and heads of one chunk are neighbours, which read the same keys at about the same time. Late chunks come first:
// in the causal context they have the most to read, and the last blocks to run should be short.
struct ChunkBlock {
  int64_t chunk;
  int head, tile;

  M3_DEVICE ChunkBlock(const M3MemoryAttentionParams& p, int tiles) {
    const int64_t at = block_index(), kv_heads = p.kv_heads;
    tile = static_cast<int>(at % tiles);
    head = static_cast<int>(at / tiles % kv_heads);
    chunk = p.memory.chunks - 1 - at / tiles / kv_heads;
  }
};

inline m3_status check_attention(const M3MemoryAttentionParams& p) {
  M3_GPU_TRY(check_rows("q", p.q, p.q_stride, 2));
  if (p.k != nullptr && p.keys > 0) {
    M3_GPU_TRY(check_rows("k", p.k, p.k_stride, 2));
    M3_GPU_TRY(check_rows("v", p.v, p.v_stride, 2));
  }
  M3_GPU_TRY(check_rows("mem_k", p.memory.k, p.memory.k_stride, 3));
  return check_rows("mem_v", p.memory.v, p.memory.v_stride, 3);
}

}  // namespace m3::gpu
