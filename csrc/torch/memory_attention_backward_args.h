// What the gradient of memory_attention takes beside the arguments of the forward call.
#pragma once

#include "torch/memory_attention_args.h"

namespace m3::binding {

// Keeps alive what the params point into.
struct GradientArgs {
  Tensor grad_out, grad_lse, out, lse;
};

// Checks shapes and dtypes; fills these four in `p`, whose `forward` attention_args has filled.
inline void gradient_args(GradientArgs& args, M3MemoryAttentionBackwardParams& p, const Tensor& grad_out,
                          const Tensor& grad_lse, const Tensor& out, const Tensor& lse, const Tensor& q) {
  const int64_t rows = p.forward.rows, heads = p.forward.heads, dim = p.forward.dim;
  expect_shape(grad_out, "grad_out", {rows, heads, dim});
  expect_type(grad_out, "grad_out", q.scalar_type());
  expect_shape(out, "out", {rows, heads, dim});
  expect_type(out, "out", q.scalar_type());
  expect_shape(grad_lse, "grad_lse", {rows, heads});
  expect_type(grad_lse, "grad_lse", ScalarType::Float);
  expect_shape(lse, "lse", {rows, heads});
  expect_type(lse, "lse", ScalarType::Float);
  args = {as_contiguous(grad_out), as_contiguous(grad_lse), as_contiguous(out), as_contiguous(lse)};
  p.grad_out = args.grad_out.const_data_ptr();
  p.grad_lse = args.grad_lse.const_data_ptr<float>();
  // Only read by the gradient; the struct is the forward's, where they are outputs.
  p.forward.out = const_cast<void*>(args.out.const_data_ptr());
  p.forward.lse = const_cast<float*>(args.lse.const_data_ptr<float>());
}

}  // namespace m3::binding
