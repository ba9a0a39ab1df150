#include "m3/merge_attention_states.h"

#include "common/check.h"
#include "common/parallel.h"
#include "common/simd.h"

M3_DECLARE_LEVELS(void, merge_attention_states, const M3MergeAttentionStatesParams&, int64_t, int64_t)

m3_status m3_merge_attention_states_cpu(const M3MergeAttentionStatesParams* p) {
  M3_CHECK(p->tokens >= 0 && p->heads >= 0 && p->dim >= 0, "merge_attention_states: negative size");
  const auto kernel = M3_AT_LEVEL(merge_attention_states);
  // 4096 elements are about a microsecond of work: below that a second thread costs more than it brings.
  const int64_t grain = p->dim > 0 ? 4096 / p->dim + 1 : 1;
  m3::parallel_for(p->tokens * p->heads, grain, [&](int64_t begin, int64_t end) { kernel(*p, begin, end); });
  return M3_OK;
}
