#include "torch/merge_attention_states_args.h"

namespace m3::binding {
namespace {

std::tuple<Tensor, Tensor> merge_attention_states(const Tensor& out_a, const Tensor& lse_a, const Tensor& out_b,
                                                  const Tensor& lse_b) {
  MergeArgs args(out_a, lse_a, out_b, lse_b);
  M3MergeAttentionStatesParams& p = args.params;
  Tensor out = empty_cpu({p.tokens, p.heads, p.dim}, out_a.scalar_type());
  Tensor lse = empty_cpu({p.tokens, p.heads}, ScalarType::Float);
  p.out = out.mutable_data_ptr(), p.lse = lse.mutable_data_ptr<float>();
  check(m3_merge_attention_states_cpu(&p));
  return {std::move(out), std::move(lse)};
}

}  // namespace
}  // namespace m3::binding

M3_REGISTER_CPU(merge_attention_states, m3::binding::merge_attention_states)
