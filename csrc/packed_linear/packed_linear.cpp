// Work is cut by tiles: each output column is one task's, so results do not depend on the number of threads.
#include "m3/packed_linear.h"

#include <type_traits>

#include "common/check.h"
#include "common/parallel.h"
#include "common/simd.h"

static_assert(std::is_trivially_copyable_v<M3PackedLinearParams> && std::is_standard_layout_v<M3PackedLinearParams>);

M3_DECLARE_LEVELS(void, packed_linear, const M3PackedLinearParams&, int64_t, int64_t)
M3_DECLARE_LEVELS(void, pack_activations, const void*, m3_dtype, int64_t, int64_t, const M3PackedRows&, int64_t)

namespace {
// Multiply-adds that are worth waking a thread for.
constexpr int64_t kWorthAThread = 1 << 19;
}  // namespace

m3_status m3_packed_linear_cpu(const M3PackedLinearParams* p) {
  const M3PackedWeight& w = p->weight;
  M3_CHECK(w.rows >= 0 && w.cols >= 0 && p->count >= 0, "packed_linear: negative size");
  M3_CHECK(w.cols % M3_PACKED_COLS == 0, "weight: expected a multiple of %d columns, got %lld", M3_PACKED_COLS,
           static_cast<long long>(w.cols));
  M3_CHECK(p->x_stride % 2 == 0 || p->count <= 1, "x: expected an even row stride, got %lld",
           static_cast<long long>(p->x_stride));
  M3_CHECK(p->activations == M3_ACTIVATIONS_BF16 || w.format != M3_WEIGHT_BF16, "activations: expected bf16 for bf16 weights");
  M3_CHECK((w.format != M3_WEIGHT_Q4_1 && p->activations == M3_ACTIVATIONS_BF16) || p->sums != nullptr ||
               w.cols * p->count == 0,
           "sums: q4_1 and mxint8 need them");
  M3_CHECK(p->activations == M3_ACTIVATIONS_BF16 || p->scales != nullptr || w.cols * p->count == 0,
           "scales: mxint8 needs them");
  const int64_t per_tile = M3_PACKED_ROWS * w.cols * p->count;
  const auto kernel = M3_AT_LEVEL(packed_linear);
  m3::parallel_for(m3_packed_tiles(&w), kWorthAThread / (per_tile + 1) + 1,
                   [&](int64_t begin, int64_t end) { kernel(*p, begin, end); });
  return M3_OK;
}

m3_status m3_pack_activations(const void* x, m3_dtype dtype, int64_t stride, int64_t count, const M3PackedRows* out) {
  M3_CHECK(out->cols % M3_PACKED_COLS == 0, "x: expected a multiple of %d columns, got %lld", M3_PACKED_COLS,
           static_cast<long long>(out->cols));
  M3_AT_LEVEL(pack_activations)(x, dtype, stride, count, *out, 0);
  return M3_OK;
}
