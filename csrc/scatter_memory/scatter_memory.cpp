// Copies each record into its slot. A record's dimensions are first merged where both sides are contiguous, so the usual
// case (whole records back to back, slots padded) is one memcpy per 64 KiB piece.
#include "m3/scatter_memory.h"

#include <cstring>
#include <type_traits>

#include "common/check.h"
#include "common/parallel.h"

static_assert(std::is_trivially_copyable_v<M3ScatterMemoryParams> && std::is_standard_layout_v<M3ScatterMemoryParams>);

namespace m3 {
namespace {

constexpr int64_t kPieceBytes = 64 << 10;

// The dimensions of one record, in bytes: outer ones, and an innermost run that is contiguous on both sides.
struct Layout {
  int64_t dims = 0, runs = 1, run = 0;
  int64_t size[M3_SCATTER_MAX_DIMS], arena[M3_SCATTER_MAX_DIMS], record[M3_SCATTER_MAX_DIMS];
};

Layout merge_dimensions(const M3ScatterMemoryParams& p) {
  Layout layout;
  layout.run = p.element_size;
  bool inner = true;  // still growing the contiguous run
  for (int64_t d = p.dims - 1; d >= 0; --d) {
    if (p.size[d] == 1) continue;
    const int64_t arena = p.arena_strides[d] * p.element_size, record = p.record_strides[d] * p.element_size;
    if (inner && arena == layout.run && record == layout.run) {
      layout.run *= p.size[d];
      continue;
    }
    inner = false;
    layout.size[layout.dims] = p.size[d], layout.arena[layout.dims] = arena, layout.record[layout.dims] = record;
    layout.runs *= p.size[d];
    ++layout.dims;
  }
  return layout;
}

void copy_run(const Layout& layout, int64_t run, char* arena, const char* record, int64_t offset, int64_t bytes) {
  for (int64_t d = 0; d < layout.dims; ++d) {
    const int64_t i = run % layout.size[d];
    arena += i * layout.arena[d], record += i * layout.record[d];
    run /= layout.size[d];
  }
  std::memcpy(arena + offset, record + offset, static_cast<size_t>(bytes));
}

}  // namespace
}  // namespace m3

m3_status m3_scatter_memory_cpu(const M3ScatterMemoryParams* p) {
  M3_CHECK(p->slots >= 0 && p->records >= 0 && p->dims >= 0 && p->dims < M3_SCATTER_MAX_DIMS,
           "scatter_memory: sizes are negative, or a record has %d dimensions or more", M3_SCATTER_MAX_DIMS);
  for (int64_t d = 0; d < p->dims; ++d) {
    M3_CHECK(p->size[d] >= 0, "scatter_memory: negative size");
    if (p->size[d] == 0) return M3_OK;
  }
  for (int64_t n = 0; n < p->records; ++n)
    M3_CHECK(p->slot[n] >= -1 && p->slot[n] < p->slots, "slots[%lld]: expected -1..%lld, got %d",
             static_cast<long long>(n), static_cast<long long>(p->slots - 1), p->slot[n]);
  const m3::Layout layout = m3::merge_dimensions(*p);
  const int64_t pieces = (layout.run + m3::kPieceBytes - 1) / m3::kPieceBytes;
  const int64_t per_record = layout.runs * pieces;
  const int64_t grain = m3::kPieceBytes / (layout.run < m3::kPieceBytes ? layout.run : m3::kPieceBytes);
  m3::parallel_for(p->records * per_record, grain, [&](int64_t begin, int64_t end) {
    int64_t known = -1;
    bool stays = false;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t n = task / per_record, slot = p->slot[n];
      if (n != known) {
        known = n, stays = slot >= 0;
        // The last record for a slot stays; threads must not race for it.
        for (int64_t later = n + 1; stays && later < p->records; ++later) stays = p->slot[later] != slot;
      }
      if (!stays) continue;
      const int64_t run = task % per_record / pieces, offset = task % pieces * m3::kPieceBytes;
      const int64_t left = layout.run - offset;
      m3::copy_run(layout, run, static_cast<char*>(p->arena) + slot * p->slot_stride * p->element_size,
                   static_cast<const char*>(p->record) + n * p->record_stride * p->element_size, offset,
                   left < m3::kPieceBytes ? left : m3::kPieceBytes);
    }
  });
  return M3_OK;
}
