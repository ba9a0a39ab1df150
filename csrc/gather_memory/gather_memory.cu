// A row of the result is a run of units (16 bytes each, where every row lies at a multiple of that), copied by
// neighbouring threads. A block takes as many rows as its threads have units for, in the order of the result.
#include "common/cuda/shapes.cuh"
#include "common/cuda/words.cuh"
#include "m3/cuda.h"

namespace m3::gpu {

constexpr int kGatherThreads = 256;

struct GatherPlan {
  Divider units;  // of a row
  int32_t rows;   // of a block
  int64_t all;    // rows of the result: N 2 Hkv K, below 2^31
};

template <class Unit>
M3_DEVICE void gather(const M3GatherMemoryParams& p, const GatherPlan& plan) {
  const int width = static_cast<int>(plan.units.divisor);
  const auto tokens = static_cast<uint32_t>(p.tokens), heads = static_cast<uint32_t>(p.heads);
  for (int at = thread_index(); at < plan.rows * width; at += kGatherThreads) {
    const int local = plan.units.quotient(at), unit = at - local * width;
    const int64_t row = block_index() * plan.rows + local;
    if (row >= plan.all) return;
    const auto run = static_cast<uint32_t>(row) / tokens;  // (reference, side, head)
    const int64_t head = run % heads, side = run / heads % 2, ref = run / heads / 2;
    const int64_t token = static_cast<uint32_t>(row) - run * tokens;
    const int32_t index = p.index[(ref * p.heads + head) * p.tokens + token];
    Unit value{};
    if (index >= 0 && index < p.rows) {
      // Each number chosen by itself: a choice between arrays of parameters would be read from local memory.
      const int64_t at_ref = ref * (side ? p.v_stride[0] : p.k_stride[0]),
                    at_row = index * (side ? p.v_stride[1] : p.k_stride[1]),
                    at_head = head * (side ? p.v_stride[2] : p.k_stride[2]);
      const char* from = static_cast<const char*>(side ? p.v : p.k) + (at_ref + at_row + at_head) * p.element_size;
      value = load_as<Unit>(from + unit * sizeof(Unit));
    }
    store_as(static_cast<char*>(p.kv) + (row * width + unit) * sizeof(Unit), value);
  }
}

M3_KERNEL void M3_THREADS(kGatherThreads) gather_rows(M3GatherMemoryParams p, GatherPlan plan) {
  gather<Words>(p, plan);
}

// Rows at odd places: element by element, still side by side.
template <class Element>
M3_KERNEL void M3_THREADS(kGatherThreads) gather_elements(M3GatherMemoryParams p, GatherPlan plan) {
  gather<Element>(p, plan);
}

inline bool wide_rows(const M3GatherMemoryParams& p) {
  const auto at_16 = [&](const void* first, const int64_t* strides) {
    bool good = reinterpret_cast<uintptr_t>(first) % 16 == 0;
    for (int i = 0; i < 3; ++i) good = good && strides[i] * p.element_size % 16 == 0;
    return good;
  };
  return p.dim * p.element_size % 16 == 0 && at_16(p.k, p.k_stride) && at_16(p.v, p.v_stride);
}

}  // namespace m3::gpu

extern "C" m3_status m3_gather_memory_cuda(const M3GatherMemoryParams* p, void* stream) {
  using namespace m3::gpu;
  const bool wide = wide_rows(*p);
  const int64_t unit = wide ? sizeof(Words) : p->element_size, units = p->dim * p->element_size / unit;
  GatherPlan plan;
  plan.all = p->refs * 2 * p->heads * p->tokens;
  if (plan.all == 0 || units == 0) return M3_OK;
  if (plan.all > kMostBlocks || units > 1 << 15)
    return fail(M3_UNSUPPORTED, "index: expected at most %lld rows of at most 32768 values for the CUDA kernel",
                static_cast<long long>(kMostBlocks));
  plan.units = Divider(units);
  plan.rows = static_cast<int32_t>(units < kGatherThreads ? kGatherThreads / units : 1);
  const Grid grid{(plan.all + plan.rows - 1) / plan.rows, kGatherThreads, 0};
  if (wide) return launch(&gather_rows, grid, stream, *p, plan);
  if (p->element_size == 2) return launch(&gather_elements<uint16_t>, grid, stream, *p, plan);
  if (p->element_size == 4) return launch(&gather_elements<uint32_t>, grid, stream, *p, plan);
  return fail(M3_UNSUPPORTED, "k: expected elements of 2 or 4 bytes for the CUDA kernel, got %lld",
              static_cast<long long>(p->element_size));
}
