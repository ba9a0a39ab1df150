// memory_attention on CUDA: out = softmax(scale q [memory; context]^T + bias) [memory values; context values].
//
// A block has 128 query vectors of one chunk and KV head (rows x heads of the group, side by side in the M of mma) and
// goes through the chunk's memory tokens, then through the context up to the last key its rows see, 32 tokens at a
// time, in one running softmax; two tiles of tokens are in shared memory, one of them under way.
// docs/ops/memory_attention.md has the traffic; alone: nvcc -std=c++17 -O3 -arch=sm_80 -Icsrc -Icsrc/include -cubin
// csrc/memory_attention/memory_attention.cu
#include <type_traits>

#include "m3/cuda.h"
#include "memory_attention/attention_launch.cuh"
#include "memory_attention/record_mass.cuh"

namespace m3::gpu {

// Two blocks on every SM: as many as shared memory lets an A100 have at D = 128.
constexpr int kAttentionResident = 2;

// Query vectors, stages, and what the masses need where the queries' place is not free.
template <int D>
constexpr int kAttentionShared =
    kBlockRows * D * 2 + kStageBytes<D> + (D <= 80 ? 0 : kAttentionWarps * kMassBytes);

// Scores of a tile of memory tokens.
M3_DEVICE void bias_scores(const float* bias, float scale, WarpScores& s) {
  M3_UNROLL
  for (int n = 0; n < kTokens / 8; ++n) {
    M3_UNROLL
    for (int i = 0; i < 2; ++i) {
      const float add = bias[score_token(n, i)];
      M3_UNROLL
      for (int m = 0; m < 2; ++m) {
        M3_UNROLL
        for (int h = 0; h < 2; ++h) {
          float& x = s[m][n][2 * h + i];
          x = add == kMinusInfinity ? kMinusInfinity : x * scale + add;
        }
      }
    }
  }
}

// Scores of a tile of the context that every row sees.
M3_DEVICE void scale_scores(float scale, WarpScores& s) {
  M3_UNROLL
  for (int n = 0; n < kTokens / 8; ++n) {
    M3_UNROLL
    for (int i = 0; i < 4; ++i) s[0][n][i] *= scale, s[1][n][i] *= scale;
  }
}

// Scores of a tile of the context that begins at key `first`; row [m][h] sees visible[m][h] keys.
M3_DEVICE void mask_scores(const int (&visible)[2][2], int first, float scale, WarpScores& s) {
  M3_UNROLL
  for (int m = 0; m < 2; ++m) {
    M3_UNROLL
    for (int n = 0; n < kTokens / 8; ++n) {
      M3_UNROLL
      for (int i = 0; i < 4; ++i)
        s[m][n][i] = first + score_token(n, i) < visible[m][i / 2] ? s[m][n][i] * scale : kMinusInfinity;
    }
  }
}

template <class T, int D>
M3_KERNEL void M3_THREADS(kAttentionThreads, kAttentionResident)
    memory_attention_kernel(M3MemoryAttentionParams p, int tiles) {
  const ChunkBlock block(p, tiles);
  const ChunkRows rows(p, block.chunk, block.head, block.tile * kBlockRows);
  if (!rows.has(0)) return;
  const SequenceRows sequence(p, sequence_of(p.cu_q, p.sequences, rows.first_row));
  const int last = min_of(rows.vectors - rows.first_vector, kBlockRows) - 1;

  const int first = warp_index() * kWarpRows, own = first + lane_index();  // vectors of the tile
  T* queries = reinterpret_cast<T*>(shared_memory());
  T* mine = queries + first * D;
  const int64_t place = rows.has(own) ? rows.place(p, own) : -1;
  const int64_t q_at = place < 0 ? -1 : place / p.heads * p.q_stride[0] + place % p.heads * p.q_stride[1];
  copy_rows<D, kWarpRows>(static_cast<const T*>(p.q), mine, 0, [&](int r) { return shuffle(q_at, r); });
  commit_copies();
  char* behind = shared_memory() + kBlockRows * D * 2;
  TokenTiles<T, D> tokens(p, rows, sequence.first_key, sequence.visible(rows.row(last)), behind);
  wait_copies<0>();
  sync_warp();
  const WarpQueries<T, D> q(mine);
  sync_warp();  // from here on `mine` may be written where queries are held

  int visible[2][2];
  M3_UNROLL
  for (int i = 0; i < 4; ++i) {
    const int vector = first + 8 * i + lane_index() / 4;
    visible[i / 2][i % 2] = rows.has(vector) ? sequence.visible(rows.row(vector)) : 0;
  }
  // What the warp's first and last vector see: tiles before are seen by all, tiles behind by none.
  const bool working = rows.has(first);
  const int least = working ? sequence.visible(rows.row(first)) : 0;
  const int most = working ? sequence.visible(rows.row(min_of(first + kWarpRows - 1, last))) : 0;

  RecordMass mass(p.mass, place, p.memory.refs, p.memory.tokens,
                  D <= 80 ? reinterpret_cast<char*>(mine) : behind + kStageBytes<D> + warp_index() * kMassBytes);
  WarpSoftmax<T, D> softmax;
  const float scale = p.scale * kLog2e;
  for (int i = 0; tokens.next(i); ++i) {
    const bool memory = tokens.is_memory(i);
    const int at = tokens.first(i);  // negative: memory
    if (!working || (!memory && at >= most)) continue;
    WarpScores s = {};
    q.scores(tokens.stages, tokens.keys_at(i), s);
    if (memory)
      bias_scores(tokens.bias(i), scale, s);
    else if (at + kTokens <= least)
      scale_scores(scale, s);
    else
      mask_scores(visible, at, scale, s);
    softmax.weigh(s);
    if (memory) mass.take(i * kTokens, s, softmax.highest);
    softmax.add(s, tokens.stages, tokens.values_at(i));
  }
  if (!working) return;

  float lse[2][2];
  softmax.finish(lse);
  const float own_lse = of_own_row(lse);
  if (place >= 0) p.lse[place] = own_lse * kLn2;
  mass.finish(tokens.memory_tiles > 0 ? static_cast<int>(p.memory.refs) : 0, own_lse);
  sync_warp();
  put_rows<T, D>(softmax.out[0], mine);
  put_rows<T, D>(softmax.out[1], mine + 16 * D);
  sync_warp();
  store_rows<D, kWarpRows>(mine, 0, static_cast<T*>(p.out),
                           [&](int r) { return shuffle(place < 0 ? int64_t{-1} : place * D, r); });
}

}  // namespace m3::gpu

extern "C" m3_status m3_memory_attention_cuda(const M3MemoryAttentionParams* p, void* stream) {
  using namespace m3::gpu;
  return with_shape(p->dtype, p->dim, [&](auto type, auto dim) -> m3_status {
    using T = decltype(type);
    constexpr int D = decltype(dim)::value;
    M3_GPU_TRY(check_attention(*p));
    const int64_t tiles = chunk_tiles(*p, kBlockRows);
    return launch(&memory_attention_kernel<T, D>, {chunk_blocks(*p, tiles), kAttentionThreads, kAttentionShared<D>},
                  stream, *p, static_cast<int>(tiles));
  });
}
