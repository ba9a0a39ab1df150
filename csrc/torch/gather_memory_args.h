// The arguments of gather_memory, checked, as its launchers take them.
#pragma once

#include "m3/gather_memory.h"
#include "torch/tensor_args.h"

namespace m3::binding {

// Keeps alive what `params` points into: everything but the result.
struct GatherArgs {
  Tensor index;
  M3GatherMemoryParams params{};

  GatherArgs(const Tensor& k, const Tensor& v, const Tensor& at) {
    expect_shape(k, "k", {-1, -1, -1, -1});
    element_type(k, "k");
    M3GatherMemoryParams& p = params;
    p.refs = k.size(0), p.rows = k.size(1), p.heads = k.size(2), p.dim = k.size(3);
    expect_shape(v, "v", {p.refs, p.rows, p.heads, p.dim});
    expect_type(v, "v", k.scalar_type());
    expect_unit_stride(k, "k");
    expect_unit_stride(v, "v");
    expect_shape(at, "index", {p.refs, p.heads, -1});
    expect_type(at, "index", ScalarType::Int);
    index = as_contiguous(at);
    p.tokens = index.size(2), p.element_size = static_cast<int64_t>(k.element_size());
    p.k = k.const_data_ptr(), p.v = v.const_data_ptr(), p.index = index.const_data_ptr<int32_t>();
    for (int64_t i = 0; i < 3; ++i) p.k_stride[i] = k.stride(i), p.v_stride[i] = v.stride(i);
  }
};

}  // namespace m3::binding
