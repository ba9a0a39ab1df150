// The K heaviest of a block's candidates, in ascending order: each counts those before it in the ranking. For a few
// hundred candidates that is less work than any sort, and ties fall to the lower row by the way they are counted.
#pragma once

#include "common/cuda/words.cuh"

namespace m3::gpu {

// A weight as the ranking sees it: NaN last, with what is not finite at the ends.
M3_DEVICE float ranked(float weight) {
  constexpr float kMost = 3.402823466e38f;
  return weight >= -kMost ? fminf(weight, kMost) : -kMost;
}

// How many of `count` weights come before weight j. `weights` continues with -inf to a multiple of four.
M3_DEVICE int rank_of(const float* weights, int count, int j) {
  const float mine = weights[j];
  int rank = 0;
  for (int i = 0; i < count; i += 4) {
    float other[4];
    load16(other, weights + i);
    M3_UNROLL
    for (int n = 0; n < 4; ++n) rank += other[n] > mine || (other[n] == mine && i + n < j) ? 1 : 0;
  }
  return rank;
}

// Writes start + j for the `keep` heaviest of `count` weights to index[0..tokens), -1 behind them. By the whole block,
// with weights and `chosen` (a bit per weight) in shared memory.
M3_DEVICE void keep_heaviest(const float* weights, int count, int64_t start, int64_t tokens, int threads,
                             uint32_t* chosen, int32_t* index) {
  const int keep = tokens < count ? static_cast<int>(tokens) : count;
  for (int first = 0; first < count; first += threads) {
    const int j = first + thread_index();
    const uint32_t bits = ballot(j < count && rank_of(weights, count, j < count ? j : 0) < keep);
    if (lane_index() == 0) chosen[j / 32] = bits;
  }
  sync_block();
  for (int j = thread_index(); j < count; j += threads) {
    if (!(chosen[j / 32] >> j % 32 & 1)) continue;
    int before = count_bits(chosen[j / 32] & ((1u << j % 32) - 1));
    for (int word = 0; word < j / 32; ++word) before += count_bits(chosen[word]);
    index[before] = static_cast<int32_t>(start + j);
  }
  for (int64_t at = keep + thread_index(); at < tokens; at += threads) index[at] = -1;
}

}  // namespace m3::gpu
