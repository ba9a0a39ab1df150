// A block copies one piece of one record, neighbouring threads neighbouring units: 16 bytes each, or as many as the
// layouts of both sides allow. Of several records for one slot only the last is copied, so no two blocks write the same
// byte and their order does not matter.
#include "common/cuda/shapes.cuh"
#include "common/cuda/words.cuh"
#include "m3/cuda.h"
#include "scatter_memory/runs.h"

namespace m3::gpu {

constexpr int kScatterThreads = 256;
// Loads of a thread before its first store: a full SM has 48 KiB under way then, three times what hides memory's
// latency on an H100.
constexpr int kScatterUnits = 2;
constexpr int kPiece = kScatterThreads * kScatterUnits;

struct ScatterPlan {
  ScatterRuns runs;
  uint32_t units, run_units, pieces;  // units of a record and of one run; pieces of a record
};

// Whether record n goes to `slot`: it is a slot, and no later record wants it. Asked by whole warps.
M3_DEVICE bool stays(const M3ScatterMemoryParams& p, int64_t n, int32_t slot) {
  if (slot < 0 || slot >= p.slots) return false;
  bool taken = false;
  for (int64_t later = n + 1 + lane_index(); later < p.records; later += 32) taken = taken || p.slot[later] == slot;
  return ballot(taken) == 0;
}

template <class Unit>
M3_DEVICE void scatter(const M3ScatterMemoryParams& p, const ScatterPlan& plan) {
  const auto block = static_cast<uint32_t>(block_index());
  const int64_t n = block / plan.pieces;
  const int32_t slot = p.slot[n];
  if (!stays(p, n, slot)) return;
  char* arena = static_cast<char*>(p.arena) + slot * p.slot_stride * p.element_size;
  const char* record = static_cast<const char*>(p.record) + n * p.record_stride * p.element_size;
  const uint32_t first = block % plan.pieces * kPiece + thread_index();
  int64_t to[kScatterUnits], from[kScatterUnits];
  Unit value[kScatterUnits];
  M3_UNROLL
  for (int i = 0; i < kScatterUnits; ++i) {
    const uint32_t unit = first + i * kScatterThreads;
    to[i] = from[i] = int64_t{unit} * sizeof(Unit);
    if (plan.runs.dims > 0) {  // one run, in the usual case
      uint32_t run = unit / plan.run_units;
      to[i] = from[i] = int64_t{unit - run * plan.run_units} * sizeof(Unit);
      for (int64_t d = 0; d < plan.runs.dims; ++d) {
        const auto size = static_cast<uint32_t>(plan.runs.size[d]);
        const uint32_t at = run % size;
        to[i] += at * plan.runs.arena[d], from[i] += at * plan.runs.record[d];
        run /= size;
      }
    }
    if (unit < plan.units) value[i] = load_as<Unit>(record + from[i]);
  }
  M3_UNROLL
  for (int i = 0; i < kScatterUnits; ++i)
    if (first + i * kScatterThreads < plan.units) store_as(arena + to[i], value[i]);
}

M3_KERNEL void M3_THREADS(kScatterThreads) scatter_words(M3ScatterMemoryParams p, ScatterPlan plan) {
  scatter<Words>(p, plan);
}

// Layouts that are not made of aligned 16 bytes: lengths and other single numbers, strided views.
template <class Unit>
M3_KERNEL void M3_THREADS(kScatterThreads) scatter_elements(M3ScatterMemoryParams p, ScatterPlan plan) {
  scatter<Unit>(p, plan);
}

// The most bytes, up to 16, that divide every distance and address of both sides.
inline int64_t unit_bytes(const M3ScatterMemoryParams& p, const ScatterRuns& runs) {
  uint64_t all = reinterpret_cast<uintptr_t>(p.arena) | reinterpret_cast<uintptr_t>(p.record) | uint64_t{16};
  all |= static_cast<uint64_t>(runs.run | p.slot_stride * p.element_size | p.record_stride * p.element_size);
  for (int64_t d = 0; d < runs.dims; ++d) all |= static_cast<uint64_t>(runs.arena[d] | runs.record[d]);
  return static_cast<int64_t>(all & -all);
}

}  // namespace m3::gpu

extern "C" m3_status m3_scatter_memory_cuda(const M3ScatterMemoryParams* p, void* stream) {
  using namespace m3::gpu;
  int64_t bytes = p->element_size;
  for (int64_t d = 0; d < p->dims; ++d) bytes *= p->size[d];
  if (bytes == 0 || p->records == 0) return M3_OK;
  ScatterPlan plan{};
  plan.runs = m3::scatter_runs(*p);
  const int64_t unit = unit_bytes(*p, plan.runs), units = bytes / unit, pieces = (units + kPiece - 1) / kPiece;
  if (units > int64_t{1} << 31)
    return fail(M3_UNSUPPORTED, "records: expected at most 2^31 units of %lld bytes for the CUDA kernel, got %lld",
                static_cast<long long>(unit), static_cast<long long>(units));
  plan.units = static_cast<uint32_t>(units), plan.run_units = static_cast<uint32_t>(plan.runs.run / unit);
  plan.pieces = static_cast<uint32_t>(pieces);
  const Grid grid{p->records * pieces, kScatterThreads, 0};
  switch (unit) {
    case 16: return launch(&scatter_words, grid, stream, *p, plan);
    case 8: return launch(&scatter_elements<uint64_t>, grid, stream, *p, plan);
    case 4: return launch(&scatter_elements<uint32_t>, grid, stream, *p, plan);
    case 2: return launch(&scatter_elements<uint16_t>, grid, stream, *p, plan);
    default: return launch(&scatter_elements<uint8_t>, grid, stream, *p, plan);
  }
}
