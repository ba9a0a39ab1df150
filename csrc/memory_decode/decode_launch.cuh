// What the launchers of memory_decode and memory_decode_coded share: what these kernels take, and the workspace.
#pragma once

#include "common/cuda/launch.cuh"
#include "memory_decode/decode_join.cuh"

namespace m3::gpu {

inline bool rows_at_16_bytes(const void* first, const int64_t* strides, int count) {
  bool good = reinterpret_cast<uintptr_t>(first) % 16 == 0;
  for (int i = 0; i < count; ++i) good = good && strides[i] % 8 == 0;
  return good;
}

inline m3_status check_rows(const char* name, const void* first, const int64_t* strides, int count) {
  if (rows_at_16_bytes(first, strides, count)) return M3_OK;
  return fail(M3_UNSUPPORTED, "%s: expected rows at multiples of 16 bytes for the CUDA kernel", name);
}

#define M3_GPU_TRY(call)                        \
  do {                                          \
    const m3_status m3_status_ = (call);        \
    if (m3_status_ != M3_OK) return m3_status_; \
  } while (0)

// The element types and head dimensions that are compiled: fn(T{}, std::integral_constant<int, D>{}).
template <class Fn>
m3_status with_shape(m3_dtype dtype, int64_t dim, const Fn& fn) {
  const auto with_dim = [&](auto type) -> m3_status {
    switch (dim) {
      case 64: return fn(type, std::integral_constant<int, 64>{});
      case 80: return fn(type, std::integral_constant<int, 80>{});
      case 128: return fn(type, std::integral_constant<int, 128>{});
      default: break;
    }
    return fail(M3_UNSUPPORTED, "q: expected a head dimension of 64, 80 or 128 for the CUDA kernel, got %lld",
                static_cast<long long>(dim));
  };
  if (dtype == M3_BF16) return with_dim(Bf16{});
  if (dtype == M3_F16) return with_dim(Fp16{});
  return fail(M3_UNSUPPORTED, "q: expected bfloat16 or float16 for the CUDA kernel");
}

inline DecodePlan plan_of(const M3MemoryDecodeParams& p, bool apart) {
  return decode_plan(p.sequences, p.kv_heads, p.heads / p.kv_heads, p.max_q, p.max_kv, p.memory.refs * p.memory.tokens,
                     apart);
}

inline int64_t align16(int64_t bytes) { return (bytes + 15) / 16 * 16; }

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
  return M3_OK;
}

template <class T, int D>
m3_status launch_merge(const M3MemoryDecodeParams& p, const DecodePlan& plan, const DecodeWorkspace& work,
                       void* stream) {
  if (plan.parts == 1) return M3_OK;
  return launch(&merge_parts<T, D>, {ceil_div(p.rows * p.heads, kMergeWarps), 32 * kMergeWarps, 0}, stream, p, plan,
                work);
}

}  // namespace m3::gpu
