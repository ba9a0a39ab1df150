// The query vectors (rows x heads of a group, row by row) that a tile of keys is seen by, 32 at a time: q [32, D] and
// grad_out [32, D] in shared memory, and per vector its log-sum-exp, its correction, and how many of the keys it sees.
#pragma once

#include "memory_attention_backward/gradient_tile.cuh"

namespace m3::gpu {

constexpr int kVectors = 32;

template <int D>
constexpr int kVectorStageBytes = kStages * (2 * kVectors * D * 2 + 3 * kVectors * 4);

// As TokenTiles: for (int i = 0; vectors.next(i); ++i) ...
template <class T, int D, class Visible>
struct VectorTiles {
  const M3MemoryAttentionBackwardParams& params;
  const float* corrections;
  int first_row, head, group;
  int begin, end;   // vectors, counted from those of row `first_row`
  Visible visible;  // visible(row): how many of the block's keys a row of q sees
  T* stages;
  float* numbers;
  float next_lse = kMinusInfinity;  // of this lane's vector of the next tile to copy

  M3_DEVICE VectorTiles(const M3MemoryAttentionBackwardParams& call, const float* correction, int first_row_, int head_,
                        int begin_, int end_, const Visible& sees, char* shared)
      : params(call), corrections(correction), first_row(first_row_), head(head_),
        group(static_cast<int>(call.forward.heads / call.forward.kv_heads)), begin(begin_), end(end_), visible(sees),
        stages(reinterpret_cast<T*>(shared)),
        numbers(reinterpret_cast<float*>(stages + kStages * 2 * kVectors * D)) {
    if (begin < end) look_ahead(0), copy(0);
  }

  M3_DEVICE bool next(int i) {
    if (begin + i * kVectors >= end) return false;
    wait_copies<0>();
    sync_block();
    if (begin + (i + 1) * kVectors < end) copy(i + 1);
    return true;
  }

  // How many keys the last vector of tile i sees, which sees the most.
  M3_DEVICE int most(int i) const { return visible(row(min_of(begin + (i + 1) * kVectors, end) - 1)); }
  // Elements from `stages` on.
  M3_DEVICE int queries_at(int i) const { return i % kStages * 2 * kVectors * D; }
  M3_DEVICE int gradients_at(int i) const { return queries_at(i) + kVectors * D; }
  M3_DEVICE const float* lse(int i) const { return numbers + i % kStages * 3 * kVectors; }
  M3_DEVICE const float* correction(int i) const { return lse(i) + kVectors; }
  M3_DEVICE const float* seen(int i) const { return lse(i) + 2 * kVectors; }  // as int32 bits

 private:
  M3_DEVICE int row(int vector) const { return first_row + vector / group; }
  // This lane's vector of tile i: two warps share the rows of a tile.
  M3_DEVICE int own(int i) const {
    return begin + i * kVectors + warp_index() % 2 * (kVectors / 2) + lane_index() % (kVectors / 2);
  }
  M3_DEVICE int64_t place(int vector) const {
    return row(vector) * params.forward.heads + head * group + vector % group;
  }

  // grad_out of a vector that saw nothing is not to be read, so its log-sum-exp is asked for a tile earlier.
  M3_DEVICE void look_ahead(int i) {
    const int vector = own(i);
    next_lse = vector < end ? params.forward.lse[place(vector)] : kMinusInfinity;
  }

  // Warps 0 and 1 copy q, 2 and 3 grad_out and the numbers.
  M3_DEVICE void copy(int i) {
    const M3MemoryAttentionParams& p = params.forward;
    const int vector = own(i), half = warp_index() % 2 * (kVectors / 2);
    if (warp_index() < 2) {
      const int64_t at = row(vector) * p.q_stride[0] + (head * group + vector % group) * p.q_stride[1];
      const int64_t from = vector < end ? at : -1;
      copy_rows<D, kVectors / 2>(static_cast<const T*>(p.q), stages + queries_at(i), half,
                                 [&](int r) { return shuffle(from, r); });
    } else {
      const int64_t at = next_lse == kMinusInfinity ? -1 : place(vector) * D;
      const float correction = at < 0 ? 0.0f : corrections[place(vector)];
      copy_rows<D, kVectors / 2>(static_cast<const T*>(params.grad_out), stages + gradients_at(i), half,
                                 [&](int r) { return shuffle(at, r); });
      if (lane_index() < kVectors / 2) {
        float* mine = numbers + i % kStages * 3 * kVectors + half + lane_index();
        mine[0] = base2_of(next_lse);
        mine[kVectors] = correction;
        mine[2 * kVectors] = from_bits(static_cast<uint32_t>(vector < end ? visible(row(vector)) : 0));
      }
      look_ahead(i + 1);
    }
    commit_copies();
  }
};

}  // namespace m3::gpu
