// parallel_for over [0, n) through the hook the host program installed (serial without one).
#pragma once

#include "m3/api.h"

namespace m3 {

void parallel_range(int64_t n, int64_t grain, m3_range_fn body, void* context);

// `body(begin, end)` may run on several threads at once; ranges are disjoint and cover [0, n). Ranges no longer than
// `grain` are not worth a thread.
template <class Body>
void parallel_for(int64_t n, int64_t grain, const Body& body) {
  parallel_range(
      n, grain, [](void* context, int64_t begin, int64_t end) { (*static_cast<const Body*>(context))(begin, end); },
      const_cast<void*>(static_cast<const void*>(&body)));
}

}  // namespace m3
