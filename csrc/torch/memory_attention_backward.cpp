#include <cstring>

#include "torch/memory_attention_backward_args.h"

namespace m3::binding {
namespace {

Tensor zeros_like(const Tensor& q, const MaybeTensor& like) {
  if (!like) return empty_cpu({0}, q.scalar_type());
  Tensor zeros = empty_cpu(like->sizes(), like->scalar_type());
  std::memset(zeros.mutable_data_ptr(), 0, static_cast<size_t>(zeros.numel()) * zeros.element_size());
  return zeros;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> memory_attention_backward(
    const Tensor& grad_out, const Tensor& grad_lse, const Tensor& out, const Tensor& lse, const Tensor& q,
    const MaybeTensor& k, const MaybeTensor& v, const Tensor& cu_q, const Tensor& cu_k, const Tensor& cu_chunk,
    const Tensor& mem_k, const Tensor& mem_v, const Tensor& mem_slot, const Tensor& mem_len,
    const MaybeTensor& mem_bias, const MaybeTensor& head_map, bool memory_grad, double scale, int64_t max_q,
    int64_t max_k, int64_t max_chunk) {
  AttentionArgs args;
  M3MemoryAttentionBackwardParams p{};
  p.forward = attention_args(args, q, k, v, cu_q, cu_k, cu_chunk, mem_k, mem_v, mem_slot, mem_len, mem_bias, head_map,
                             scale, max_q, max_k, max_chunk);
  GradientArgs gradients;
  gradient_args(gradients, p, grad_out, grad_lse, out, lse, q);

  const MaybeTensor absent;
  Tensor grad_q = empty_cpu({p.forward.rows, p.forward.heads, p.forward.dim}, q.scalar_type());
  Tensor grad_k = zeros_like(q, k), grad_v = zeros_like(q, v);
  Tensor grad_mem_k = zeros_like(q, memory_grad ? MaybeTensor(mem_k) : absent);
  Tensor grad_mem_v = zeros_like(q, memory_grad ? MaybeTensor(mem_v) : absent);
  const bool bias_grad = memory_grad && mem_bias.has_value();
  Tensor grad_mem_bias = bias_grad ? zeros_like(q, mem_bias) : empty_cpu({0}, ScalarType::Float);
  p.grad_q = grad_q.mutable_data_ptr();
  p.grad_k = k ? grad_k.mutable_data_ptr() : nullptr;
  p.grad_v = k ? grad_v.mutable_data_ptr() : nullptr;
  p.grad_mem_k = memory_grad ? grad_mem_k.mutable_data_ptr() : nullptr;
  p.grad_mem_v = memory_grad ? grad_mem_v.mutable_data_ptr() : nullptr;
  p.grad_mem_bias = bias_grad ? grad_mem_bias.mutable_data_ptr<float>() : nullptr;
  check(m3_memory_attention_backward_cpu(&p));
  return {std::move(grad_q),     std::move(grad_k),     std::move(grad_v),
          std::move(grad_mem_k), std::move(grad_mem_v), std::move(grad_mem_bias)};
}

}  // namespace
}  // namespace m3::binding

M3_REGISTER_CPU(memory_attention_backward, m3::binding::memory_attention_backward)
