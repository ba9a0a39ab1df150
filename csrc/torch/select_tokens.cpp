#include "m3/select_tokens.h"

#include "torch/tensor_args.h"

namespace m3::binding {
namespace {

m3_select_rule rule_by_name(const std::string& rule) {
  if (rule == "received") return M3_SELECT_RECEIVED;
  if (rule == "exp") return M3_SELECT_EXP;
  STD_TORCH_CHECK(rule == "causal", "rule: expected one of received, exp, causal, got ", rule);
  return M3_SELECT_CAUSAL;
}

Tensor select_tokens(const Tensor& q, const Tensor& k, const Tensor& length, int64_t tokens, int64_t start,
                     double scale, std::string rule) {
  expect_shape(q, "q", {-1, -1, -1, -1});
  const int64_t refs = q.size(0), rows = q.size(1), dim = q.size(3);
  const m3_dtype dtype = element_type(q, "q");
  STD_TORCH_CHECK(dim >= 8 && dim % 8 == 0, "q: expected a head dimension that is a multiple of 8, got ", dim);
  expect_shape(k, "k", {refs, rows, -1, dim});
  expect_type(k, "k", q.scalar_type());
  const int64_t kv_heads = k.size(2);
  STD_TORCH_CHECK(kv_heads > 0 && q.size(2) > 0 && q.size(2) % kv_heads == 0,
                  "q: expected a number of heads that is a multiple of the ", kv_heads, " of k, got ", q.size(2));
  expect_unit_stride(q, "q");
  expect_unit_stride(k, "k");
  expect_shape(length, "length", {refs});
  expect_type(length, "length", ScalarType::Int);
  STD_TORCH_CHECK(tokens > 0 && tokens <= M3_SELECT_MAX_TOKENS, "tokens: expected 1..", M3_SELECT_MAX_TOKENS, ", got ",
                  tokens);
  const Tensor lengths = as_contiguous(length);
  Tensor index = empty_cpu({refs, kv_heads, tokens}, lengths.scalar_type());
  M3SelectTokensParams p{};
  p.refs = refs, p.rows = rows, p.q_heads = q.size(2), p.kv_heads = kv_heads, p.dim = dim;
  p.tokens = tokens, p.start = start, p.scale = static_cast<float>(scale);
  p.rule = rule_by_name(rule), p.dtype = dtype;
  p.q = q.const_data_ptr(), p.k = k.const_data_ptr();
  p.length = lengths.const_data_ptr<int32_t>(), p.index = index.mutable_data_ptr<int32_t>();
  for (int64_t i = 0; i < 3; ++i) p.q_stride[i] = q.stride(i), p.k_stride[i] = k.stride(i);
  const int64_t tasks = rows > start ? refs * kv_heads : 0;  // without a row to rank nothing is computed
  p.workers = 1;
  Tensor workspace;
  if (tasks > 0) {
    const int64_t threads = torch::stable::get_num_threads();
    p.workers = tasks < threads ? tasks : threads;
    workspace = empty_cpu({p.workers, m3_select_tokens_workspace(&p)}, ScalarType::Float);
    p.workspace = workspace.mutable_data_ptr<float>();
  }
  check(m3_select_tokens_cpu(&p));
  return index;
}

}  // namespace
}  // namespace m3::binding

M3_REGISTER_CPU(select_tokens, m3::binding::select_tokens)
