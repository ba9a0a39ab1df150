// One task per (reference, KV head). The work is cut into `workers` pieces, each with a workspace of its own; a task's
// result does not depend on the cut.
#include "m3/select_tokens.h"

#include <type_traits>

#include "common/check.h"
#include "common/parallel.h"
#include "common/simd.h"
#include "select_tokens/layout.h"

static_assert(std::is_trivially_copyable_v<M3SelectTokensParams> && std::is_standard_layout_v<M3SelectTokensParams>);

M3_DECLARE_LEVELS(void, select_tokens, const M3SelectTokensParams&, int64_t, int64_t, float*)

int64_t m3_select_tokens_workspace(const M3SelectTokensParams* p) { return m3::select_layout(*p).floats; }

m3_status m3_select_tokens_cpu(const M3SelectTokensParams* p) {
  M3_CHECK(p->refs >= 0 && p->rows >= 0 && p->dim >= 0 && p->workers > 0, "select_tokens: negative size");
  M3_CHECK(p->kv_heads > 0 && p->q_heads > 0 && p->q_heads % p->kv_heads == 0,
           "q: expected a number of heads that is a multiple of the %lld of k, got %lld",
           static_cast<long long>(p->kv_heads), static_cast<long long>(p->q_heads));
  M3_CHECK(p->tokens > 0 && p->tokens <= M3_SELECT_MAX_TOKENS, "tokens: expected 1..%d, got %lld",
           M3_SELECT_MAX_TOKENS, static_cast<long long>(p->tokens));
  M3_CHECK(p->start >= 0, "start: expected a row number, 0 or more, got %lld", static_cast<long long>(p->start));
  M3_CHECK(p->rule >= M3_SELECT_RECEIVED && p->rule <= M3_SELECT_CAUSAL,
           "rule: expected one of received, exp, causal, got number %d", static_cast<int>(p->rule));
  for (int64_t n = 0; n < p->refs; ++n)
    M3_CHECK(p->length[n] >= 0 && p->length[n] <= p->rows, "length[%lld]: expected 0..%lld, got %d",
             static_cast<long long>(n), static_cast<long long>(p->rows), p->length[n]);
  const auto kernel = M3_AT_LEVEL(select_tokens);
  const int64_t tasks = p->refs * p->kv_heads, floats = m3_select_tokens_workspace(p);
  m3::parallel_for(p->workers, 1, [&](int64_t begin, int64_t end) {
    for (int64_t worker = begin; worker < end; ++worker)
      for (int64_t task = worker; task < tasks; task += p->workers)
        kernel(*p, task / p->kv_heads, task % p->kv_heads, p->workspace + worker * floats);
  });
  return M3_OK;
}
