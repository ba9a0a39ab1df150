#include "m3/ceilings.h"

#include <atomic>

#include "common/parallel.h"
#include "common/simd.h"

M3_DECLARE_LEVELS(uint32_t, ceiling_read, const uint8_t*, int64_t)
M3_DECLARE_LEVELS(int64_t, ceiling_dot, int64_t)

uint32_t m3_ceiling_read(const void* data, int64_t bytes) {
  constexpr int64_t kPage = 4096;
  const auto kernel = M3_AT_LEVEL(ceiling_read);
  std::atomic<uint32_t> total{0};
  m3::parallel_for(bytes / kPage, 256, [&](int64_t begin, int64_t end) {
    total += kernel(static_cast<const uint8_t*>(data) + begin * kPage, (end - begin) * kPage);
  });
  return total;
}

int64_t m3_ceiling_dot(int64_t steps, int64_t copies) {
  const auto kernel = M3_AT_LEVEL(ceiling_dot);
  std::atomic<int64_t> total{0};
  m3::parallel_for(copies, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) total += kernel(steps);
  });
  return total;
}
