// The tokens that a tile of query vectors reads, 32 at a time: those of its chunk's records, then the context's. A tile
// is copied to shared memory as keys [32, D] and values [32, D], by four warps; absent tokens are zeros.
#pragma once

#include "memory_attention/chunk_rows.cuh"

namespace m3::gpu {

constexpr int kAttentionWarps = 4;
constexpr int kAttentionThreads = 32 * kAttentionWarps;
constexpr int kTokens = 32;
constexpr int kStages = 2;

template <int D>
constexpr int kStageElements = 2 * kTokens * D;
template <int D>
constexpr int kStageBytes = kStages * (kStageElements<D> * 2 + kTokens * 4);

// Two stages, so that one tile is under way while another is worked on:
//   for (int i = 0; tiles.next(i); ++i) ... tiles.keys_at(i), tiles.values_at(i) ...
template <class T, int D>
struct TokenTiles {
  const M3MemoryAttentionParams& p;
  const ChunkRows& rows;
  int64_t first_key;        // of the sequence, in k
  int keys_end;             // context keys that some vector of the tile sees
  int record_head;          // -1: no records
  int memory_tiles, tiles;  // tiles of records, and all
  T* stages;
  float* biases;            // [stages, 32], base 2; -inf: there is no such token

  M3_DEVICE TokenTiles(const M3MemoryAttentionParams& params, const ChunkRows& chunk_rows, int64_t sequence_key,
                       int visible, char* shared)
      : p(params), rows(chunk_rows), first_key(sequence_key), keys_end(visible) {
    record_head = gpu::record_head(p.memory, rows.head);
    const int64_t tokens = record_head < 0 ? 0 : p.memory.refs * p.memory.tokens;
    memory_tiles = static_cast<int>((tokens + kTokens - 1) / kTokens);
    tiles = memory_tiles + (keys_end + kTokens - 1) / kTokens;
    stages = reinterpret_cast<T*>(shared);
    biases = reinterpret_cast<float*>(stages + kStages * kStageElements<D>);
    if (tiles > 0) copy(0);
  }

  // Whether there is a tile `i`; if so it can be read afterwards, by the whole block, until the next call.
  M3_DEVICE bool next(int i) {
    if (i >= tiles) return false;
    wait_copies<0>();
    sync_block();
    if (i + 1 < tiles) copy(i + 1);
    return true;
  }

  M3_DEVICE bool is_memory(int i) const { return i < memory_tiles; }
  // Of a tile of the context: its first key in the sequence.
  M3_DEVICE int first(int i) const { return (i - memory_tiles) * kTokens; }
  // Elements from `stages` on.
  M3_DEVICE int keys_at(int i) const { return i % kStages * kStageElements<D>; }
  M3_DEVICE int values_at(int i) const { return keys_at(i) + kTokens * D; }
  M3_DEVICE const float* bias(int i) const { return biases + i % kStages * kTokens; }

 private:
  // Warps 0 and 1 copy keys, 2 and 3 values, each one half of the rows. A lane finds out where one row is.
  M3_DEVICE void copy(int i) {
    const bool values = warp_index() >= 2;
    const int half = warp_index() % 2 * (kTokens / 2), own = half + lane_index() % (kTokens / 2);
    const bool memory = is_memory(i);
    const int64_t at = memory ? memory_row(i, own, values) : context_row(first(i) + own, values);
    const void* base = memory ? (values ? p.memory.v : p.memory.k) : (values ? p.v : p.k);
    T* to = stages + (values ? values_at(i) : keys_at(i));
    copy_rows<D, kTokens / 2>(static_cast<const T*>(base), to, half, [&](int r) { return shuffle(at, r); });
    commit_copies();
  }

  // Where a row begins, -1: there is none.
  M3_DEVICE int64_t memory_row(int i, int own, bool values) {
    const M3Records& memory = p.memory;
    const MemoryToken token = memory_token(memory, rows.chunk, record_head, i * kTokens + own);
    if (!values && lane_index() < kTokens / 2)
      biases[i % kStages * kTokens + own] = token_bias(memory, token, record_head);
    const int64_t* stride = values ? memory.v_stride : memory.k_stride;
    return token.slot < 0 ? -1 : token.slot * stride[0] + record_head * stride[1] + token.position * stride[2];
  }
  M3_DEVICE int64_t context_row(int key, bool values) const {
    const int64_t* stride = values ? p.v_stride : p.k_stride;
    return key < keys_end ? (first_key + key) * stride[0] + rows.head * stride[1] : -1;
  }
};

}  // namespace m3::gpu
