// merge_attention_states on CUDA: per row (token, head) out = wa out_a + wb out_b, wa = exp(lse_a - lse), wb likewise.
//
// A thread takes 16 bytes of a row, neighbouring threads neighbouring pieces; a block takes whole rows. A side of
// weight 0 is not read. Alone: nvcc -std=c++17 -O3 -arch=sm_80 -Icsrc -Icsrc/include -cubin
// csrc/merge_attention_states/merge_attention_states.cu
#include "common/cuda/shapes.cuh"
#include "common/cuda/softmax_tile.cuh"
#include "common/cuda/words.cuh"
#include "m3/cuda.h"

namespace m3::gpu {

constexpr int kMergeThreads = 256;

struct MergePlan {
  Divider pieces;  // of 16 bytes in a row
  int32_t rows;    // of a block
  int64_t all;
};

template <class T>
M3_DEVICE void add_scaled(const void* from, int64_t piece, float weight, float (&sum)[8]) {
  if (weight == 0.0f) return;
  const Words words = load_as<Words>(static_cast<const T*>(from) + piece * 8);
  M3_UNROLL
  for (int i = 0; i < 4; ++i)
    sum[2 * i] += weight * low_of<T>(words.at[i]), sum[2 * i + 1] += weight * high_of<T>(words.at[i]);
}

template <class T>
M3_KERNEL void M3_THREADS(kMergeThreads) merge_states_kernel(M3MergeAttentionStatesParams p, MergePlan plan) {
  const int pieces = static_cast<int>(plan.pieces.divisor), local = plan.pieces.quotient(thread_index());
  const int64_t row = block_index() * plan.rows + local;
  if (local >= plan.rows || row >= plan.all) return;
  const int at = thread_index() - local * pieces;
  const float a = p.lse_a[row] * kLog2e, b = p.lse_b[row] * kLog2e, most = fmaxf(a, b);
  float weight_a = 0.0f, weight_b = 0.0f, lse = kMinusInfinity;
  if (most != kMinusInfinity) {
    weight_a = exp2_fast(a - most), weight_b = exp2_fast(b - most);
    const float total = weight_a + weight_b, inverse = 1.0f / total;
    weight_a *= inverse, weight_b *= inverse;
    lse = most + log2_fast(total);
  }
  const int64_t piece = row * pieces + at;
  float sum[8] = {};
  add_scaled<T>(p.out_a, piece, weight_a, sum);
  add_scaled<T>(p.out_b, piece, weight_b, sum);
  store_as(static_cast<T*>(p.out) + piece * 8, Words{{pack<T>(sum[0], sum[1]), pack<T>(sum[2], sum[3]),
                                                      pack<T>(sum[4], sum[5]), pack<T>(sum[6], sum[7])}});
  if (at == 0) p.lse[row] = lse * kLn2;
}

namespace {

template <class T>
m3_status merge_states(const M3MergeAttentionStatesParams& p, void* stream) {
  const int64_t pieces = p.dim / 8, all = p.tokens * p.heads;
  const auto aligned = [](const void* at) { return reinterpret_cast<uintptr_t>(at) % 16 == 0; };
  if (p.dim % 8 != 0 || pieces < 1 || pieces > kMergeThreads || !aligned(p.out_a) || !aligned(p.out_b))
    return fail(M3_UNSUPPORTED,
                "out_a, out_b: expected rows at multiples of 16 bytes, of at most %d elements, for the CUDA kernel",
                8 * kMergeThreads);
  const auto rows = static_cast<int32_t>(kMergeThreads / pieces);
  const MergePlan plan{Divider(pieces), rows, all};
  return launch(&merge_states_kernel<T>, {(all + rows - 1) / rows, kMergeThreads, 0}, stream, p, plan);
}

}  // namespace
}  // namespace m3::gpu

extern "C" m3_status m3_merge_attention_states_cuda(const M3MergeAttentionStatesParams* p, void* stream) {
  using namespace m3::gpu;
  if (p->dtype == M3_BF16) return merge_states<Bf16>(*p, stream);
  if (p->dtype == M3_F16) return merge_states<Fp16>(*p, stream);
  return fail(M3_UNSUPPORTED, "out_a: expected bfloat16 or float16 for the CUDA kernel");
}
