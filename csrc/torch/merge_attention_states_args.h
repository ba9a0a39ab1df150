// The arguments of merge_attention_states, checked, as its launchers take them.
#pragma once

#include "m3/merge_attention_states.h"
#include "torch/tensor_args.h"

namespace m3::binding {

// Keeps alive what `params` points into: everything but the outputs.
struct MergeArgs {
  Tensor out_a, out_b, lse_a, lse_b;
  M3MergeAttentionStatesParams params{};

  MergeArgs(const Tensor& a, const Tensor& a_lse, const Tensor& b, const Tensor& b_lse) {
    expect_shape(a, "out_a", {-1, -1, -1});
    params.tokens = a.size(0), params.heads = a.size(1), params.dim = a.size(2);
    params.dtype = element_type(a, "out_a");
    expect_shape(b, "out_b", {params.tokens, params.heads, params.dim});
    expect_type(b, "out_b", a.scalar_type());
    expect_shape(a_lse, "lse_a", {params.tokens, params.heads});
    expect_shape(b_lse, "lse_b", {params.tokens, params.heads});
    expect_type(a_lse, "lse_a", ScalarType::Float);
    expect_type(b_lse, "lse_b", ScalarType::Float);
    out_a = as_contiguous(a), out_b = as_contiguous(b), lse_a = as_contiguous(a_lse), lse_b = as_contiguous(b_lse);
    params.out_a = out_a.const_data_ptr(), params.out_b = out_b.const_data_ptr();
    params.lse_a = lse_a.const_data_ptr<float>(), params.lse_b = lse_b.const_data_ptr<float>();
  }
};

}  // namespace m3::binding
