// One task per (reference, side, head): K rows copied from [T, Hkv, D] to [K, D]. Copies only, so one element size
// serves every dtype and memcpy is the SIMD.
#include "m3/gather_memory.h"

#include <cstring>
#include <type_traits>

#include "common/check.h"
#include "common/parallel.h"

static_assert(std::is_trivially_copyable_v<M3GatherMemoryParams> && std::is_standard_layout_v<M3GatherMemoryParams>);

m3_status m3_gather_memory_cpu(const M3GatherMemoryParams* p) {
  M3_CHECK(p->refs >= 0 && p->rows >= 0 && p->heads >= 0 && p->tokens >= 0 && p->dim >= 0,
           "gather_memory: negative size");
  const int64_t count = p->refs * p->heads * p->tokens;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t row = p->index[i];
    M3_CHECK(row >= -1 && row < p->rows, "index[%lld, %lld, %lld]: expected -1..%lld, got %lld",
             static_cast<long long>(i / (p->heads * p->tokens)), static_cast<long long>(i / p->tokens % p->heads),
             static_cast<long long>(i % p->tokens), static_cast<long long>(p->rows - 1), static_cast<long long>(row));
  }
  const int64_t row_bytes = p->dim * p->element_size;
  // About 16 KiB a task: below that a second thread costs more than it brings.
  const int64_t grain = 16384 / (p->tokens * row_bytes + 1) + 1;
  m3::parallel_for(p->refs * 2 * p->heads, grain, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t head = task % p->heads, side = task / p->heads % 2, ref = task / p->heads / 2;
      const int64_t* stride = side ? p->v_stride : p->k_stride;
      const char* from = static_cast<const char*>(side ? p->v : p->k) +
                         (ref * stride[0] + head * stride[2]) * p->element_size;
      const int32_t* index = p->index + (ref * p->heads + head) * p->tokens;
      char* to = static_cast<char*>(p->kv) + task * p->tokens * row_bytes;
      for (int64_t j = 0; j < p->tokens; ++j, to += row_bytes) {
        if (index[j] < 0)
          std::memset(to, 0, static_cast<size_t>(row_bytes));
        else
          std::memcpy(to, from + index[j] * stride[1] * p->element_size, static_cast<size_t>(row_bytes));
      }
    }
  });
  return M3_OK;
}
