// What the launchers of memory_decode and memory_decode_coded share: checks of the operands, and the workspace.
#pragma once

#include "common/cuda/shapes.cuh"
#include "memory_decode/decode_join.cuh"

namespace m3::gpu {

inline DecodePlan plan_of(const M3MemoryDecodeParams& p, bool apart) {
  DecodePlan plan = decode_plan(p.sequences, p.kv_heads, p.heads / p.kv_heads, p.max_q, p.max_kv,
                                p.memory.refs * p.memory.tokens, apart);
  while (p.block_table && int64_t{1} << plan.page_shift < p.page) ++plan.page_shift;
  return plan;
}

// Lays out the workspace from `base`; returns its bytes.
inline int64_t lay_out(const M3MemoryDecodeParams& p, const DecodePlan& plan, void* base, DecodeWorkspace& work) {
  const int64_t vectors = p.rows * p.heads, parts = plan.parts > 1 ? plan.parts : 0;
  const int64_t out = align16(parts * vectors * p.dim * 4), lse = align16(parts * vectors * 4);
  char* at = static_cast<char*>(base);
  work.out = reinterpret_cast<float*>(at);
  work.lse = reinterpret_cast<float*>(at + out);
  work.score = reinterpret_cast<float*>(at + out + lse);
  return out + lse + vectors * p.memory.refs * p.memory.tokens * 4;
}

inline int64_t decode_blocks(const M3MemoryDecodeParams& p, const DecodePlan& plan) {
  return p.rows > 0 ? p.sequences * p.kv_heads * plan.row_tiles * plan.parts : 0;
}

inline m3_status check_decode(const M3MemoryDecodeParams& p) {
  M3_GPU_TRY(check_rows("q", p.q, p.q_stride, 2));
  M3_GPU_TRY(check_rows("k_cache", p.k_cache, p.k_stride, 3));
  M3_GPU_TRY(check_rows("v_cache", p.v_cache, p.v_stride, 3));
  // A tile's rows are addressed from its first one with 32 bits; everything else with 64.
  constexpr int64_t kMostApart = int64_t{1} << 26;
  if (p.k_stride[1] > kMostApart || p.v_stride[1] > kMostApart)
    return fail(M3_UNSUPPORTED, "k_cache, v_cache: expected tokens at most %lld elements apart for the CUDA kernel",
                static_cast<long long>(kMostApart));
  return M3_OK;
}

template <class T, int D>
m3_status launch_merge(const M3MemoryDecodeParams& p, const DecodePlan& plan, const DecodeWorkspace& work,
                       void* stream) {
  if (plan.parts == 1) return M3_OK;
  const Grid grid{ceil_div(p.rows * p.heads, kMergeWarps), 32 * kMergeWarps, 0};
  return launch_behind(&merge_parts<T, D>, grid, stream, p, plan, work);
}

}  // namespace m3::gpu
