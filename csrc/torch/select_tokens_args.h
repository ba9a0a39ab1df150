// The arguments of select_tokens, checked, as its launchers take them.
#pragma once

#include "m3/select_tokens.h"
#include "torch/tensor_args.h"

namespace m3::binding {

inline m3_select_rule rule_by_name(const std::string& rule) {
  if (rule == "received") return M3_SELECT_RECEIVED;
  if (rule == "exp") return M3_SELECT_EXP;
  STD_TORCH_CHECK(rule == "causal", "rule: expected one of received, exp, causal, got ", rule);
  return M3_SELECT_CAUSAL;
}

// Keeps alive what `params` points into: everything but the index and the workspace.
struct SelectArgs {
  Tensor length;
  M3SelectTokensParams params{};

  SelectArgs(const Tensor& q, const Tensor& k, const Tensor& lengths, int64_t tokens, int64_t start, double scale,
             const std::string& rule) {
    expect_shape(q, "q", {-1, -1, -1, -1});
    M3SelectTokensParams& p = params;
    p.refs = q.size(0), p.rows = q.size(1), p.q_heads = q.size(2), p.dim = q.size(3);
    p.dtype = element_type(q, "q");
    STD_TORCH_CHECK(p.dim >= 8 && p.dim % 8 == 0, "q: expected a head dimension that is a multiple of 8, got ", p.dim);
    expect_shape(k, "k", {p.refs, p.rows, -1, p.dim});
    expect_type(k, "k", q.scalar_type());
    p.kv_heads = k.size(2);
    STD_TORCH_CHECK(p.kv_heads > 0 && p.q_heads > 0 && p.q_heads % p.kv_heads == 0,
                    "q: expected a number of heads that is a multiple of the ", p.kv_heads, " of k, got ", p.q_heads);
    expect_unit_stride(q, "q");
    expect_unit_stride(k, "k");
    expect_shape(lengths, "length", {p.refs});
    expect_type(lengths, "length", ScalarType::Int);
    STD_TORCH_CHECK(tokens > 0 && tokens <= M3_SELECT_MAX_TOKENS, "tokens: expected 1..", M3_SELECT_MAX_TOKENS,
                    ", got ", tokens);
    length = as_contiguous(lengths);
    p.tokens = tokens, p.start = start, p.scale = static_cast<float>(scale);
    p.rule = rule_by_name(rule);
    p.q = q.const_data_ptr(), p.k = k.const_data_ptr(), p.length = length.const_data_ptr<int32_t>();
    for (int64_t i = 0; i < 3; ++i) p.q_stride[i] = q.stride(i), p.k_stride[i] = k.stride(i);
  }
};

}  // namespace m3::binding
