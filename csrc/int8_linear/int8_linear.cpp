// Rows of x are quantised first; then blocks of rows times groups of tiles are work for any thread. Every output is one
// task's, and sums are integers: results depend neither on the number of threads nor on the order.
#include "m3/int8_linear.h"

#include <type_traits>

#include "common/check.h"
#include "common/parallel.h"
#include "common/simd.h"
#include "int8_linear/units.h"

static_assert(std::is_trivially_copyable_v<M3Int8LinearParams> && std::is_standard_layout_v<M3Int8LinearParams>);

M3_DECLARE_LEVELS(void, quantise_rows, const M3Int8LinearParams&, const m3::Int8Rows&, int64_t, int64_t)
M3_DECLARE_LEVELS(void, int8_linear, const M3Int8LinearParams&, const m3::Int8Rows&, int64_t, int64_t)

namespace {
// What is worth waking a thread for: values to quantise, multiply-adds.
constexpr int64_t kWorthQuantising = 1 << 14, kWorthMultiplying = 1 << 20;
}  // namespace

int64_t m3_int8_linear_workspace(const M3Int8LinearParams* p) { return m3::cut_rows(*p).bytes; }

m3_status m3_int8_linear_cpu(const M3Int8LinearParams* p) {
  const M3Int8Weight& w = p->weight;
  M3_CHECK(w.rows >= 0 && w.cols >= 0 && p->count >= 0, "int8_linear: negative size");
  M3_CHECK(w.cols <= M3_INT8_MOST_COLS, "weight: expected at most %d columns, got %lld", M3_INT8_MOST_COLS,
           static_cast<long long>(w.cols));
  if (p->count == 0 || w.rows == 0) return M3_OK;
  const m3::Int8Rows rows = m3::cut_rows(*p);
  const auto quantise = M3_AT_LEVEL(quantise_rows);
  m3::parallel_for(p->count, kWorthQuantising / (rows.cols + 1) + 1,
                   [&](int64_t begin, int64_t end) { quantise(*p, rows, begin, end); });
  const auto multiply = M3_AT_LEVEL(int8_linear);
  const int64_t each = m3::unit_rows(*p) * m3::kUnitTiles * M3_INT8_ROWS * rows.cols;
  m3::parallel_for(m3::units(*p), kWorthMultiplying / (each + 1) + 1,
                   [&](int64_t begin, int64_t end) { multiply(*p, rows, begin, end); });
  return M3_OK;
}
