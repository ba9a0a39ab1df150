// memory_decode on CUDA: out = softmax(scale q [memory; cache]^T + bias) [memory values; cache values].
//
// Split-KV flash decoding. The memory tokens of a sequence and its cache are one row of tiles of 16 tokens, cut into
// parts; memory is a part of its own where the cache is split, else the first part's beginning. A block takes one part
// for 16 query vectors, the heads of a group (and the new tokens) side by side in the M of mma (decode_block.cuh), and
// merge_parts joins the parts. docs/ops/memory_decode.md has the traffic; alone: nvcc -std=c++17 -O3 -arch=sm_80
// -Icsrc -Icsrc/include -cubin csrc/memory_decode/memory_decode.cu
#include "m3/cuda.h"
#include "memory_decode/decode_launch.cuh"
#include "memory_decode/decode_loop.cuh"

namespace m3::gpu {

template <class T, int D>
M3_KERNEL void M3_THREADS(kDecodeThreads, kDecodeResident)
    memory_decode_kernel(M3MemoryDecodeParams p, DecodePlan plan, DecodeWorkspace work) {
  let_next_start();
  const DecodeBlock block(p, plan);
  if (block.vectors <= 0) return;
  // Tiles of this part: memory's first, then the context's.
  const bool has_memory = plan.parts > plan.splits ? block.part == plan.splits : block.part == 0;
  const int memory_tiles = has_memory ? plan.memory_tiles : 0, before = block.first_tile - memory_tiles;
  const int from = record_head(p.memory, block.head);
  const float scale = p.scale * kLog2e;
  const Visible visible(block);
  const auto start = [&](int tile, T* stage) {
    if (tile < memory_tiles)
      copy_memory<T, D>(p.memory, block, from, tile, stage);
    else
      copy_context<T, D>(p, plan, block, before + tile, stage);
  };
  const auto mask = [&](int tile, TileScores& s) {
    if (tile < memory_tiles)
      bias_memory(p, block, from, tile, scale, work.score, s);
    else
      mask_context(p, plan, block, visible, before + tile, scale, s);
  };
  SoftmaxTile<T, D> softmax;
  attend_tiles<T, D>(p, block, block.end_tile - before, start, mask, softmax);
  const Join<D> join = join_warps<T, D>(softmax);
  write_rows<T, D>(p, plan, work, block, join);
}

}  // namespace m3::gpu

extern "C" {

int64_t m3_memory_decode_cuda_workspace(const M3MemoryDecodeParams* p) {
  m3::gpu::DecodeWorkspace work;
  return m3::gpu::lay_out(*p, m3::gpu::plan_of(*p, false), nullptr, work);
}

m3_status m3_memory_decode_cuda(const M3MemoryDecodeParams* p, void* workspace, void* stream) {
  using namespace m3::gpu;
  return with_shape(p->dtype, p->dim, [&](auto type, auto dim) -> m3_status {
    using T = decltype(type);
    constexpr int D = decltype(dim)::value;
    static_assert(kJoinBytes<D> <= kDecodeShared<D>);
    M3_GPU_TRY(check_decode(*p));
    M3_GPU_TRY(check_rows("mem_k", p->memory.k, p->memory.k_stride, 3));
    M3_GPU_TRY(check_rows("mem_v", p->memory.v, p->memory.v_stride, 3));
    const DecodePlan plan = plan_of(*p, false);
    DecodeWorkspace work;
    lay_out(*p, plan, workspace, work);
    M3_GPU_TRY(launch(&memory_decode_kernel<T, D>, {decode_blocks(*p, plan), kDecodeThreads, kDecodeShared<D>}, stream,
                      *p, plan, work));
    return launch_merge<T, D>(*p, plan, work, stream);
  });
}

}  // extern "C"
