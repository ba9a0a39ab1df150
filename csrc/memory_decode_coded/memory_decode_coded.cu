// memory_decode_coded on CUDA: memory_decode with records looked up in codebooks.
//
// With x = rot^T y: q . x = (rot q) . y and sum p x = rot^T sum p y. Memory is always a part of its own: its block
// rotates the queries once, attends in the basis of the codes (coded_block.cuh) and rotates the result back, which
// merge_parts joins with the parts of the context. Alone: nvcc -std=c++17 -O3 -arch=sm_80 -Icsrc -Icsrc/include -cubin
// csrc/memory_decode_coded/memory_decode_coded.cu
#include "m3/cuda.h"
#include "memory_decode/decode_launch.cuh"
#include "memory_decode/decode_loop.cuh"
#include "memory_decode_coded/coded_block.cuh"

namespace m3::gpu {

// The joined rows of the memory part, rotated back, to the workspace.
template <class T, int D>
M3_DEVICE void write_coded(const M3MemoryDecodeCodedParams& p, const DecodePlan& plan, const DecodeWorkspace& work,
                           const DecodeBlock& block, const Join<D>& join) {
  if (!p.v_book.rot) return write_rows<T, D>(p.decode, plan, work, block, join);
  const SplitRows<T, D> rows(reinterpret_cast<T*>(shared_memory() + kJoinBytes<D>));
  join_rows<T, D>(join, block.vectors, rows);
  const int64_t part = block.part * p.decode.rows * p.decode.heads;
  const auto place = [&](int row) {
    const int vector = block.row_tile * kTileRows + row;
    return part + block.row_of(vector) * p.decode.heads + block.head_of(vector);
  };
  float* to[2];
  for (int h = 0; h < 2; ++h) {
    const int row = score_row(2 * h);
    to[h] = row < block.vectors ? work.out + place(row) * D : nullptr;
  }
  rotate_back<T, D>(p.v_book.rot, rows, [&](int h, int column, const Group<float, 2>& value) {
    if (to[h]) store_as(to[h] + column, value);
  });
  if (thread_index() < block.vectors) {
    float factor[kDecodeWarps];
    work.lse[place(thread_index())] = join.weights(thread_index(), factor);
  }
}

// Blocks an SM should hold. D = 128 needs more registers than three leave; two have 64 to 128 KB under way.
template <int D>
constexpr int kCodedResident = D > 80 ? 2 : kDecodeResident;

template <class T, int D>
M3_KERNEL void M3_THREADS(kDecodeThreads, kCodedResident<D>)
    memory_decode_coded_kernel(M3MemoryDecodeCodedParams p, DecodePlan plan, CodedPlan coded, DecodeWorkspace work) {
  let_next_start();
  const DecodeBlock block(p.decode, plan, plan.splits == 1 ? PartOrder::kMemoryFirst : PartOrder::kSideBySide);
  if (block.vectors <= 0) return;
  if (block.part == plan.splits) {
    SoftmaxTile<T, D> softmax;
    attend_coded<T, D>(p, coded, block, plan.memory_tiles, work.score, softmax);
    write_coded<T, D>(p, plan, work, block, join_warps<T, D>(softmax));
    return;
  }
  const float scale = p.decode.scale * kLog2e;
  const Visible visible(block);
  const auto start = [&](int tile, T* stage) {
    copy_context<T, D>(p.decode, plan, block, block.first_tile + tile, stage);
  };
  const auto mask = [&](int tile, TileScores& s) {
    mask_context(p.decode, plan, block, visible, block.first_tile + tile, scale, s);
  };
  SoftmaxTile<T, D> softmax;
  attend_tiles<T, D>(p.decode, block, block.end_tile - block.first_tile, start, mask, softmax);
  write_rows<T, D>(p.decode, plan, work, block, join_warps<T, D>(softmax));
}

namespace {

m3_status check_side(const char* name, const M3Book& book, const uint8_t* codes, const int64_t* stride) {
  const auto aligned = [](const void* at) { return reinterpret_cast<uintptr_t>(at) % 16 == 0; };
  if (book.fine_parts > kMostParts)
    return fail(M3_UNSUPPORTED, "%s_fine: expected at most %d pieces for the CUDA kernel, got %lld", name, kMostParts,
                static_cast<long long>(book.fine_parts));
  if (!aligned(codes) || stride[0] % 16 != 0 || stride[1] % 16 != 0)
    return fail(M3_UNSUPPORTED, "mem_%s_codes: expected codes at multiples of 16 bytes for the CUDA kernel", name);
  if (!aligned(book.coarse) || !aligned(book.fine) || !aligned(book.rot))
    return fail(M3_UNSUPPORTED,
                "%s_coarse, %s_fine, %s_rot: expected tables at multiples of 16 bytes for the CUDA kernel", name, name,
                name);
  return M3_OK;
}

// Of the two kinds of blocks.
template <class T, int D>
int64_t coded_shared(const CodedPlan& plan) {
  static_assert(kJoinBytes<D> + SplitRows<T, D>::kElements * sizeof(T) <= kDecodeShared<D>);
  const int64_t coded = CodedStage<T, D>::bytes(plan);
  return coded > kDecodeShared<D> ? coded : kDecodeShared<D>;
}

}  // namespace
}  // namespace m3::gpu

extern "C" {

int64_t m3_memory_decode_coded_cuda_workspace(const M3MemoryDecodeCodedParams* p) {
  m3::gpu::DecodeWorkspace work;
  return m3::gpu::lay_out(p->decode, m3::gpu::plan_of(p->decode, true), nullptr, work);
}

m3_status m3_memory_decode_coded_cuda(const M3MemoryDecodeCodedParams* p, void* workspace, void* stream) {
  using namespace m3::gpu;
  return with_shape(p->decode.dtype, p->decode.dim, [&](auto type, auto dim) -> m3_status {
    using T = decltype(type);
    constexpr int D = decltype(dim)::value;
    M3_GPU_TRY(check_decode(p->decode));
    M3_GPU_TRY(check_side("k", p->k_book, p->k_codes, p->k_code_stride));
    M3_GPU_TRY(check_side("v", p->v_book, p->v_codes, p->v_code_stride));
    if (p->k_book.dtype != p->v_book.dtype)
      return fail(M3_UNSUPPORTED, "k_coarse, v_coarse: expected tables of one type for the CUDA kernel");
    const DecodePlan plan = plan_of(p->decode, true);
    const CodedPlan coded(*p);
    DecodeWorkspace work;
    lay_out(p->decode, plan, workspace, work);
    const Grid grid{decode_blocks(p->decode, plan), kDecodeThreads, coded_shared<T, D>(coded)};
    M3_GPU_TRY(launch(&memory_decode_coded_kernel<T, D>, grid, stream, *p, plan, coded, work));
    return launch_merge<T, D>(p->decode, plan, work, stream);
  });
}

}  // extern "C"
