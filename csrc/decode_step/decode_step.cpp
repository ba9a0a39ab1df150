#include "m3/decode_step.h"

#include <type_traits>

#include "common/attention_checks.h"
#include "common/check.h"
#include "decode_step/parts.h"

static_assert(std::is_trivially_copyable_v<M3DecodeStepParams> && std::is_standard_layout_v<M3DecodeStepParams>);

namespace m3 {
namespace {

typedef long long ll;  // what %lld takes everywhere

constexpr int64_t kBlock = M3_PACKED_COLS;

m3_status check_weight(const M3PackedWeight& w, int64_t index, int64_t rows, int64_t cols) {
  M3_CHECK(w.rows == rows && w.cols == cols, "weights[%lld]: expected %lld rows and %lld columns, got %lld and %lld",
           ll(index), ll(rows), ll(cols), ll(w.rows), ll(w.cols));
  return M3_OK;
}

m3_status check_sizes_of(const M3DecodeStepParams& p) {
  M3_CHECK(p.batch >= 0 && p.layers >= 0 && p.vocab > 0 && p.dim > 0 && p.ffn > 0, "decode_step: a size is negative or 0");
  M3_TRY(check_sizes(p.head_dim, p.heads, p.kv_heads));
  M3_CHECK(p.dim % kBlock == 0, "embed: expected a multiple of %lld columns, got %lld", ll(kBlock), ll(p.dim));
  M3_CHECK(p.ffn % kBlock == 0, "weights: expected gate and up of a multiple of %lld rows each, got %lld", ll(kBlock),
           ll(p.ffn));
  M3_CHECK(p.heads * p.head_dim % kBlock == 0, "weights: expected heads of a multiple of %lld columns together, got %lld",
           ll(kBlock), ll(p.heads * p.head_dim));
  M3_CHECK(p.threads >= 1, "threads: expected at least 1, got %d", p.threads);
  const int64_t q = p.heads * p.head_dim, kv = p.kv_heads * p.head_dim;
  for (int64_t layer = 0; layer < p.layers; ++layer) {
    const int64_t first = layer * M3_STEP_LINEARS;
    M3_TRY(check_weight(p.weights[first + M3_STEP_QKV], first + M3_STEP_QKV, q + 2 * kv, p.dim));
    M3_TRY(check_weight(p.weights[first + M3_STEP_OUT], first + M3_STEP_OUT, p.dim, q));
    M3_TRY(check_weight(p.weights[first + M3_STEP_GATE_UP], first + M3_STEP_GATE_UP, 2 * p.ffn, p.dim));
    M3_TRY(check_weight(p.weights[first + M3_STEP_DOWN], first + M3_STEP_DOWN, p.dim, p.ffn));
  }
  return check_weight(p.weights[p.layers * M3_STEP_LINEARS], p.layers * M3_STEP_LINEARS, p.vocab, p.dim);
}

m3_status check_values(const M3DecodeStepParams& p) {
  if (p.cu_q != nullptr) {
    M3_TRY(check_offsets("cu_q", p.cu_q, p.batch, p.count, true, "tokens", p.count));
    if (p.cu_chunk != nullptr) {
      M3_TRY(check_offsets("cu_chunk", p.cu_chunk, p.memory.chunks, p.count, true, "tokens", p.count));
      M3_TRY(check_boundaries(p.cu_q, p.batch, p.cu_chunk, p.memory.chunks));
    }
  }
  for (int64_t i = 0; i < p.count; ++i)
    M3_CHECK(p.tokens[i] >= 0 && p.tokens[i] < p.vocab, "tokens[%lld]: expected 0..%lld, got %lld", ll(i),
             ll(p.vocab - 1), ll(p.tokens[i]));
  for (int64_t b = 0; b < p.batch; ++b) {
    const int64_t fresh = p.cu_q != nullptr ? p.cu_q[b + 1] - p.cu_q[b] : 1, most = p.capacity - fresh;
    M3_CHECK(p.lengths[b] >= 0 && p.lengths[b] <= most,
             "lengths[%lld]: expected 0..%lld, since %lld more must fit the cache, got %d", ll(b), ll(most), ll(fresh),
             p.lengths[b]);
    M3_CHECK(p.lengths[b] + p.span >= 0 && p.lengths[b] + p.span + fresh <= p.positions,
             "lengths[%lld]: expected positions below %lld, the rows of rope, got %d + span %lld and %lld more", ll(b),
             ll(p.positions), p.lengths[b], ll(p.span), ll(fresh));
  }
  for (int64_t i = 0; p.rows != nullptr && i < p.wanted; ++i)
    M3_CHECK(p.rows[i] >= 0 && p.rows[i] < p.count, "rows[%lld]: expected 0..%lld, got %lld", ll(i), ll(p.count - 1),
             ll(p.rows[i]));
  for (int64_t i = 0; i < p.memory_layers; ++i)
    M3_CHECK(p.memory_layer[i] >= 0 && p.memory_layer[i] < p.layers &&
                 (i == 0 || p.memory_layer[i] > p.memory_layer[i - 1]),
             "memory_layers[%lld]: expected ascending layers below %lld, got %lld", ll(i), ll(p.layers),
             ll(p.memory_layer[i]));
  if (p.memory_layers == 0) return M3_OK;
  M3Records records = p.memory;
  if (records.head_map == nullptr) return check_records(records, p.kv_heads);
  for (int64_t i = 0; i < p.memory_layers; ++i, records.head_map += p.kv_heads)
    M3_TRY(check_records(records, p.kv_heads));
  return M3_OK;
}

}  // namespace
}  // namespace m3

int64_t m3_decode_step_workspace(const M3DecodeStepParams* p) {
  return p->cu_q != nullptr ? m3::prompt_workspace(*p) : m3::one_token_workspace(*p);
}

m3_status m3_decode_step_cpu(const M3DecodeStepParams* p) {
  M3_TRY(m3::check_sizes_of(*p));
  M3_TRY(m3::check_values(*p));
  if (p->batch == 0) return M3_OK;
  p->cu_q != nullptr ? m3::prompt(*p) : m3::one_token(*p);
  return M3_OK;
}
