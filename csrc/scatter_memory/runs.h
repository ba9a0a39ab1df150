// A record's layout on both sides, as the runs of bytes that can be copied at once.
#pragma once

#include "m3/scatter_memory.h"

namespace m3 {

// Outer dimensions (sizes, and distances in bytes), innermost first, and an innermost run contiguous on both sides.
struct ScatterRuns {
  int64_t dims = 0, run = 0;
  int64_t size[M3_SCATTER_MAX_DIMS], arena[M3_SCATTER_MAX_DIMS], record[M3_SCATTER_MAX_DIMS];
};

// Joins neighbouring dimensions that lie back to back on both sides. Sizes are positive.
inline ScatterRuns scatter_runs(const M3ScatterMemoryParams& p) {
  ScatterRuns runs;
  runs.run = p.element_size;
  for (int64_t d = p.dims - 1; d >= 0; --d) {
    if (p.size[d] == 1) continue;
    const int64_t arena = p.arena_strides[d] * p.element_size, record = p.record_strides[d] * p.element_size;
    const int64_t last = runs.dims - 1;
    if (last < 0 && arena == runs.run && record == runs.run) {
      runs.run *= p.size[d];
    } else if (last >= 0 && arena == runs.size[last] * runs.arena[last] &&
               record == runs.size[last] * runs.record[last]) {
      runs.size[last] *= p.size[d];
    } else {
      runs.size[runs.dims] = p.size[d], runs.arena[runs.dims] = arena, runs.record[runs.dims] = record;
      ++runs.dims;
    }
  }
  return runs;
}

}  // namespace m3
