// The memory tokens of a chunk, numbered r K + position; what the index tensors say of them, with a bad index as none.
#pragma once

#include "common/cuda/softmax_tile.cuh"
#include "m3/records.h"

namespace m3::gpu {

M3_DEVICE int32_t clamp_index(int32_t value, int64_t low, int64_t high) {
  return static_cast<int32_t>(value < low ? low : value > high ? high : value);
}

// The record head that KV head `head` reads, or -1.
M3_DEVICE int record_head(const M3Records& memory, int head) {
  const int from = memory.head_map ? memory.head_map[head] : head;
  return from >= 0 && from < memory.heads ? from : -1;
}

struct MemoryToken {
  int64_t slot = -1;  // -1: there is none
  int position = 0;
};

// Token `index` of a chunk for record head `head` (-1: none).
M3_DEVICE MemoryToken memory_token(const M3Records& memory, int64_t chunk, int head, int64_t index) {
  MemoryToken token;
  const int tokens = static_cast<int>(memory.tokens);
  if (head < 0 || index >= memory.refs * tokens) return token;
  const int at = static_cast<int>(index);
  token.position = at % tokens;
  const int32_t slot = memory.slot[chunk * memory.refs + at / tokens];
  if (slot >= 0 && slot < memory.slots && token.position < memory.length[slot]) token.slot = slot;
  return token;
}

// What is added to its score, in base 2.
M3_DEVICE float token_bias(const M3Records& memory, const MemoryToken& token, int head) {
  if (token.slot < 0) return kMinusInfinity;
  if (!memory.bias) return 0.0f;
  return memory.bias[token.slot * memory.bias_stride[0] + head * memory.bias_stride[1] + token.position] * kLog2e;
}

}  // namespace m3::gpu
