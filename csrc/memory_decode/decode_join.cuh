// The end of a block of memory_decode: its warps' results become one, which is the result, or a part of it that
// merge_parts joins with the others.
#pragma once

#include "common/cuda/overlap.cuh"
#include "memory_decode/decode_block.cuh"

namespace m3::gpu {

// Floats from one row of a warp's output to the next: eight more than the row, against bank conflicts.
template <int D>
constexpr int kJoinPitch = D + 8;

template <int D>
constexpr int kJoinBytes = (kDecodeWarps * kTileRows * kJoinPitch<D> + kDecodeWarps * kTileRows * 2) * 4;

template <int D>
struct Join {
  float* out;  // [warps, 16, kJoinPitch<D>]
  float* highest;  // [warps, 16]
  float* sum;

  M3_DEVICE explicit Join(char* shared)
      : out(reinterpret_cast<float*>(shared)),
        highest(out + kDecodeWarps * kTileRows * kJoinPitch<D>),
        sum(highest + kDecodeWarps * kTileRows) {}

  // This warp's result to shared memory.
  template <class T>
  M3_DEVICE void put(const SoftmaxTile<T, D>& tile) {
    float* mine = out + warp_index() * kTileRows * kJoinPitch<D>;
    M3_UNROLL
    for (int h = 0; h < 2; ++h) {
      const int row = score_row(2 * h);
      M3_UNROLL
      for (int n = 0; n < D / 8; ++n) {
        float* at = mine + row * kJoinPitch<D> + score_token(n, 0);
        at[0] = tile.out[n][2 * h], at[1] = tile.out[n][2 * h + 1];
      }
      if (lane_index() % 4 == 0) {
        highest[warp_index() * kTileRows + row] = tile.highest[h];
        sum[warp_index() * kTileRows + row] = tile.sum[h];
      }
    }
  }

  // Log-sum-exp of a row in base 2, and each warp's factor on its output.
  M3_DEVICE float weights(int row, float (&factor)[kDecodeWarps]) const {
    float most = kMinusInfinity;
    for (int w = 0; w < kDecodeWarps; ++w) most = fmaxf(most, highest[w * kTileRows + row]);
    if (most == kMinusInfinity) {
      for (int w = 0; w < kDecodeWarps; ++w) factor[w] = 0.0f;
      return kMinusInfinity;
    }
    float total = 0.0f;
    for (int w = 0; w < kDecodeWarps; ++w) {
      factor[w] = exp2_fast(highest[w * kTileRows + row] - most);
      total += factor[w] * sum[w * kTileRows + row];
    }
    const float inverse = 1.0f / total;
    for (int w = 0; w < kDecodeWarps; ++w) factor[w] *= inverse;
    return most + log2_fast(total);
  }

  // Four values of a row's output.
  M3_DEVICE void read(int row, int column, const float (&factor)[kDecodeWarps], float (&value)[4]) const {
    for (int i = 0; i < 4; ++i) value[i] = 0.0f;
    for (int w = 0; w < kDecodeWarps; ++w) {
      const float* from = out + (w * kTileRows + row) * kJoinPitch<D> + column;
      for (int i = 0; i < 4; ++i) value[i] += factor[w] * from[i];
    }
  }
};

// The warps' results in shared memory. All warps must have left what was there.
template <class T, int D>
M3_DEVICE Join<D> join_warps(const SoftmaxTile<T, D>& softmax) {
  Join<D> join(shared_memory());
  join.put(softmax);
  sync_block();
  return join;
}

template <class T>
M3_DEVICE void store4(T* to, const float (&value)[4]) {
  store8(to, pack<T>(value[0], value[1]), pack<T>(value[2], value[3]));
}

// Writes the joined rows: to the outputs if this is the only part, else to the workspace.
template <class T, int D>
M3_DEVICE void write_rows(const M3MemoryDecodeParams& p, const DecodePlan& plan, const DecodeWorkspace& work,
                          const DecodeBlock& block, const Join<D>& join) {
  const bool only = plan.parts == 1;
  const int64_t part = block.part * p.rows * p.heads;
  for (int piece = thread_index(); piece < block.vectors * D / 4; piece += kDecodeThreads) {
    const int row = piece / (D / 4), column = piece % (D / 4) * 4;
    const int vector = block.row_tile * kTileRows + row;
    const int64_t at = block.row_of(vector) * p.heads + block.head_of(vector);
    float factor[kDecodeWarps], value[4];
    const float lse = join.weights(row, factor);
    join.read(row, column, factor, value);
    if (only)
      store4(static_cast<T*>(p.out) + at * D + column, value);
    else if (lse != kMinusInfinity)
      store16(work.out + (part + at) * D + column, value);
    if (column > 0) continue;
    if (only)
      p.lse[at] = lse * kLn2;
    else
      work.lse[part + at] = lse;
  }
  if (!only) return;
  const int refs = static_cast<int>(p.memory.refs);
  for (int i = thread_index(); i < block.vectors * refs; i += kDecodeThreads) {
    const int row = i / refs, vector = block.row_tile * kTileRows + row;
    const int64_t at = block.row_of(vector) * p.heads + block.head_of(vector);
    float factor[kDecodeWarps];
    const float lse = join.weights(row, factor);
    const float* scores = work.score + at * refs * p.memory.tokens;
    p.mass[at * refs + i % refs] = record_mass(scores, p.memory.tokens, i % refs, lse);
  }
}

constexpr int kMergeWarps = 4;

// One warp per query vector: the parts' softmaxes become one.
template <class T, int D>
M3_KERNEL void M3_THREADS(32 * kMergeWarps)
    merge_parts(M3MemoryDecodeParams p, DecodePlan plan, DecodeWorkspace work) {
  const int64_t vectors = p.rows * p.heads, at = block_index() * kMergeWarps + warp_index();
  wait_for_previous();
  if (at >= vectors) return;
  float most = kMinusInfinity;
  for (int part = 0; part < plan.parts; ++part) most = fmaxf(most, work.lse[part * vectors + at]);
  float total = 0.0f, value[4] = {};
  const int column = lane_index() * 4;
  if (most != kMinusInfinity) {
    for (int part = 0; part < plan.parts; ++part) {
      const float lse = work.lse[part * vectors + at];
      if (lse == kMinusInfinity) continue;
      const float weight = exp2_fast(lse - most);
      total += weight;
      if (column >= D) continue;
      float from[4];
      load16(from, work.out + (part * vectors + at) * D + column);
      for (int i = 0; i < 4; ++i) value[i] += weight * from[i];
    }
    const float inverse = 1.0f / total;
    for (int i = 0; i < 4; ++i) value[i] *= inverse;
  }
  const float lse = most == kMinusInfinity ? kMinusInfinity : most + log2_fast(total);
  if (column < D) store4(static_cast<T*>(p.out) + at * D + column, value);
  if (lane_index() == 0) p.lse[at] = lse * kLn2;
  for (int64_t r = lane_index(); r < p.memory.refs; r += 32)
    p.mass[at * p.memory.refs + r] =
        record_mass(work.score + at * p.memory.refs * p.memory.tokens, p.memory.tokens, r, lse);
}

}  // namespace m3::gpu
