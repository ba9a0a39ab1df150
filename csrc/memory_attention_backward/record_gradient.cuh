// The last two kernels of memory_attention_backward: who reads which slot, and the sum over its readers. A slot belongs
// to the first place in mem_slot that lists it, so that as many blocks have work as slots are listed, however large the
// arena.
#pragma once

#include "memory_attention_backward/gradient_tile.cuh"

namespace m3::gpu {

constexpr int kLinkWarps = 4;
// Little is computed: many blocks on an SM hide the way from one reader to the next.
constexpr int kRecordResident = 8;

// The slot at a place in mem_slot, -1 if it is none, or its chunk has no rows and so leaves nothing.
M3_DEVICE int32_t slot_at(const M3MemoryAttentionParams& p, int64_t place) {
  const int32_t slot = p.memory.slot[place];
  if (slot < 0 || slot >= p.memory.slots) return -1;
  return ChunkRows(p, place / p.memory.refs, 0, 0).vectors > 0 ? slot : -1;
}

// One warp per place: looks for its slot before and behind.
M3_KERNEL void M3_THREADS(32 * kLinkWarps) attention_link_readers(M3MemoryAttentionParams p, GradientWorkspace work) {
  const int64_t places = p.memory.chunks * p.memory.refs, at = block_index() * kLinkWarps + warp_index();
  if (at >= places) return;
  const int32_t slot = slot_at(p, at);
  const auto same = [&](int64_t place) { return p.memory.slot[place] == slot && slot_at(p, place) == slot; };
  bool before = false;
  for (int64_t from = 0; slot >= 0 && !before && from < at; from += 32)
    before = ballot(from + lane_index() < at && same(from + lane_index())) != 0;
  int64_t next = -1;
  for (int64_t from = at + 1; slot >= 0 && next < 0 && from < places; from += 32) {
    const uint32_t found = ballot(from + lane_index() < places && same(from + lane_index()));
    if (found != 0) next = from + __builtin_popcount((found & (0u - found)) - 1);
  }
  if (lane_index() > 0) return;
  work.first[at] = slot >= 0 && !before;
  work.next[at] = static_cast<int32_t>(next);
}

// Adds four floats at `from`.
M3_DEVICE void add4(float (&sum)[4], const float* from) {
  float more[4];
  load16(more, from);
  M3_UNROLL
  for (int i = 0; i < 4; ++i) sum[i] += more[i];
}

// A block per place in mem_slot and record head: if the place is its slot's first, adds what the slot's readers left,
// chunk by chunk, and in a chunk head by head.
template <class T, int D>
M3_KERNEL void M3_THREADS(kAttentionThreads, kRecordResident)
    attention_record_gradient(M3MemoryAttentionBackwardParams params, GradientWorkspace work) {
  const M3MemoryAttentionParams& p = params.forward;
  const M3Records& memory = p.memory;
  const int record_head = static_cast<int>(block_index() % memory.heads);
  const int first = static_cast<int>(block_index() / memory.heads);
  if (!work.first[first]) return;
  const int refs = static_cast<int>(memory.refs), tokens = static_cast<int>(memory.tokens);
  const int kv_heads = static_cast<int>(p.kv_heads);
  const int64_t slot = memory.slot[first], to = (slot * memory.heads + record_head) * tokens;
  const int length = clamp_index(memory.length[slot], 0, tokens);
  const bool biased = params.grad_mem_bias != nullptr;
  for (int i = thread_index(); i < length * (D / 4); i += kAttentionThreads) {
    const int position = i / (D / 4), column = i % (D / 4) * 4;
    float k[4] = {}, v[4] = {}, bias = 0.0f;
    for (int at = first; at >= 0; at = work.next[at]) {
      for (int head = 0; head < kv_heads; ++head) {
        if (gpu::record_head(memory, head) != record_head) continue;
        const int64_t from = (int64_t{at / refs} * kv_heads + head) * refs * tokens + at % refs * tokens + position;
        add4(k, work.record_k + from * D + column);
        add4(v, work.record_v + from * D + column);
        if (biased && column == 0) bias += work.record_bias[from];
      }
    }
    const int64_t place = (to + position) * D + column;
    store8(static_cast<T*>(params.grad_mem_k) + place, pack<T>(k[0], k[1]), pack<T>(k[2], k[3]));
    store8(static_cast<T*>(params.grad_mem_v) + place, pack<T>(v[0], v[1]), pack<T>(v[2], v[3]));
    if (biased && column == 0) params.grad_mem_bias[to + position] = bias;
  }
}

}  // namespace m3::gpu
