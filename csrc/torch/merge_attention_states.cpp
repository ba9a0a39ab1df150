#include "m3/merge_attention_states.h"

#include "torch/tensor_args.h"

namespace m3::binding {
namespace {

std::tuple<Tensor, Tensor> merge_attention_states(const Tensor& out_a, const Tensor& lse_a, const Tensor& out_b,
                                                  const Tensor& lse_b) {
  expect_shape(out_a, "out_a", {-1, -1, -1});
  const int64_t tokens = out_a.size(0), heads = out_a.size(1), dim = out_a.size(2);
  const m3_dtype dtype = element_type(out_a, "out_a");
  expect_shape(out_b, "out_b", {tokens, heads, dim});
  expect_type(out_b, "out_b", out_a.scalar_type());
  expect_shape(lse_a, "lse_a", {tokens, heads});
  expect_shape(lse_b, "lse_b", {tokens, heads});
  expect_type(lse_a, "lse_a", ScalarType::Float);
  expect_type(lse_b, "lse_b", ScalarType::Float);
  const Tensor a = as_contiguous(out_a), b = as_contiguous(out_b);
  const Tensor la = as_contiguous(lse_a), lb = as_contiguous(lse_b);
  Tensor out = empty_cpu({tokens, heads, dim}, a.scalar_type());
  Tensor lse = empty_cpu({tokens, heads}, la.scalar_type());
  M3MergeAttentionStatesParams p{tokens, heads, dim, dtype, a.const_data_ptr(), b.const_data_ptr(),
                                 la.const_data_ptr<float>(), lb.const_data_ptr<float>(), out.mutable_data_ptr(),
                                 lse.mutable_data_ptr<float>()};
  check(m3_merge_attention_states_cpu(&p));
  return {out, lse};
}

}  // namespace
}  // namespace m3::binding

M3_REGISTER_CPU(merge_attention_states, m3::binding::merge_attention_states)
