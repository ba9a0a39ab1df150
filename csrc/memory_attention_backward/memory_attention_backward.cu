// memory_attention_backward on CUDA: four kernels, each the only writer of its results, so that nothing is atomic and
// every sum has one order.
//   attention_query_gradient   grad_q by the forward's tiles, and the correction of every row   query_gradient.cuh
//   attention_key_gradient     grad_k, grad_v of the context; shares of memory tokens           key_gradient.cuh
//   attention_link_readers     where each slot is listed again                                  record_gradient.cuh
//   attention_record_gradient  sums of the shares, by slot                                      record_gradient.cuh
// docs/ops/memory_attention_backward.md has the traffic; alone: nvcc -std=c++17 -O3 -arch=sm_80 -Icsrc -Icsrc/include
// -cubin csrc/memory_attention_backward/memory_attention_backward.cu
#include <type_traits>

#include "m3/cuda.h"
#include "memory_attention_backward/key_gradient.cuh"
#include "memory_attention_backward/query_gradient.cuh"
#include "memory_attention_backward/record_gradient.cuh"

namespace m3::gpu {
namespace {

// Lays out the workspace from `base`; returns its bytes.
int64_t lay_out(const M3MemoryAttentionBackwardParams& params, void* base, GradientWorkspace& work) {
  const M3MemoryAttentionParams& p = params.forward;
  const bool records = params.grad_mem_k != nullptr;
  const int64_t places = records ? p.memory.chunks * p.memory.refs : 0;
  const int64_t shares = places * p.kv_heads * p.memory.tokens;
  char* at = static_cast<char*>(base);
  int64_t bytes = 0;
  const auto take = [&](int64_t size) {
    char* const found = at + bytes;
    bytes += align16(size);
    return found;
  };
  work.correction = reinterpret_cast<float*>(take(p.rows * p.heads * 4));
  work.record_k = reinterpret_cast<float*>(take(shares * p.dim * 4));
  work.record_v = reinterpret_cast<float*>(take(shares * p.dim * 4));
  work.record_bias = reinterpret_cast<float*>(take(shares * 4));
  work.next = reinterpret_cast<int32_t*>(take(places * 4));
  work.first = reinterpret_cast<int32_t*>(take(places * 4));
  return bytes;
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

KeyGradientGrid key_grid(const M3MemoryAttentionBackwardParams& params, int64_t& blocks) {
  const M3MemoryAttentionParams& p = params.forward;
  const int64_t context_tiles = p.k != nullptr ? ceil_div(p.max_k, kBlockKeys) : 0;
  const int64_t memory_tiles = params.grad_mem_k != nullptr ? ceil_div(p.memory.refs * p.memory.tokens, kBlockKeys) : 0;
  const int64_t context_blocks = p.sequences * p.kv_heads * context_tiles;
  blocks = context_blocks + p.memory.chunks * p.kv_heads * memory_tiles;
  return {context_blocks, static_cast<int32_t>(context_tiles), static_cast<int32_t>(memory_tiles)};
}

}  // namespace
}  // namespace m3::gpu

extern "C" {

int64_t m3_memory_attention_backward_cuda_workspace(const M3MemoryAttentionBackwardParams* params) {
  m3::gpu::GradientWorkspace work;
  return m3::gpu::lay_out(*params, nullptr, work);
}

m3_status m3_memory_attention_backward_cuda(const M3MemoryAttentionBackwardParams* params, void* workspace,
                                            void* stream) {
  using namespace m3::gpu;
  const M3MemoryAttentionParams& p = params->forward;
  return with_shape(p.dtype, p.dim, [&](auto type, auto dim) -> m3_status {
    using T = decltype(type);
    constexpr int D = decltype(dim)::value;
    M3_GPU_TRY(check_attention(p));
    GradientWorkspace work;
    lay_out(*params, workspace, work);
    const int64_t tiles = chunk_tiles(p, kGradientRows);
    M3_GPU_TRY(launch(&attention_query_gradient<T, D>,
                      {chunk_blocks(p, tiles), kAttentionThreads, kQueryGradientShared<D>}, stream, *params, work,
                      static_cast<int>(tiles)));
    int64_t blocks;
    const KeyGradientGrid grid = key_grid(*params, blocks);
    M3_GPU_TRY(launch(&attention_key_gradient<T, D>, {blocks, kAttentionThreads, kKeyGradientShared<D>}, stream,
                      *params, work, grid));
    if (params->grad_mem_k == nullptr || p.memory.tokens == 0) return M3_OK;
    const int64_t places = p.memory.chunks * p.memory.refs;
    M3_GPU_TRY(launch(&attention_link_readers, {ceil_div(places, kLinkWarps), 32 * kLinkWarps, 0}, stream, p, work));
    return launch(&attention_record_gradient<T, D>, {places * p.memory.heads, kAttentionThreads, 0}, stream, *params,
                  work);
  });
}

}  // extern "C"
