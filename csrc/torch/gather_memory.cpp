#include "m3/gather_memory.h"

#include "torch/tensor_args.h"

namespace m3::binding {
namespace {

Tensor gather_memory(const Tensor& k, const Tensor& v, const Tensor& index) {
  expect_shape(k, "k", {-1, -1, -1, -1});
  element_type(k, "k");
  const int64_t refs = k.size(0), rows = k.size(1), heads = k.size(2), dim = k.size(3);
  expect_shape(v, "v", {refs, rows, heads, dim});
  expect_type(v, "v", k.scalar_type());
  expect_unit_stride(k, "k");
  expect_unit_stride(v, "v");
  expect_shape(index, "index", {refs, heads, -1});
  expect_type(index, "index", ScalarType::Int);
  const int64_t tokens = index.size(2);
  const Tensor at = as_contiguous(index);
  Tensor kv = empty_cpu({refs, 2, heads, tokens, dim}, k.scalar_type());
  M3GatherMemoryParams p{};
  p.refs = refs, p.rows = rows, p.heads = heads, p.tokens = tokens, p.dim = dim;
  p.element_size = static_cast<int64_t>(k.element_size());
  p.k = k.const_data_ptr(), p.v = v.const_data_ptr();
  p.index = at.const_data_ptr<int32_t>(), p.kv = kv.mutable_data_ptr();
  for (int64_t i = 0; i < 3; ++i) p.k_stride[i] = k.stride(i), p.v_stride[i] = v.stride(i);
  check(m3_gather_memory_cpu(&p));
  return kv;
}

}  // namespace
}  // namespace m3::binding

M3_REGISTER_CPU(gather_memory, m3::binding::gather_memory)
