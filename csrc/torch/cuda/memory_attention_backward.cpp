#include <torch/csrc/stable/ops.h>

#include "torch/cuda/attention_values.h"
#include "torch/memory_attention_backward_args.h"

namespace m3::binding {
namespace {

// Contiguous zeros in the shape of `like`, or a tensor of no elements.
Tensor zeros_beside(const Tensor& q, const MaybeTensor& like, ScalarType type) {
  const int64_t none = 0;
  const torch::headeronly::IntHeaderOnlyArrayRef shape = like ? like->sizes() : decltype(like->sizes())(&none, 1);
  const Tensor made = empty_at(shape, type, device_type(q), device_index(q));
  torch::stable::Tensor zeroed = made;
  torch::stable::zero_(zeroed);
#if defined(M3_SIMT)
  simt_note_memory(made.const_data_ptr(), static_cast<size_t>(made.numel()) * made.element_size(), 0);
#endif
  return made;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> memory_attention_backward_cuda(
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
  check_attention_values(args, p.forward);

  const MaybeTensor absent;
  const bool bias_grad = memory_grad && mem_bias.has_value();
  Tensor grad_q = empty_beside(q, {p.forward.rows, p.forward.heads, p.forward.dim}, q.scalar_type());
  Tensor grad_k = zeros_beside(q, k, q.scalar_type()), grad_v = zeros_beside(q, v, q.scalar_type());
  Tensor grad_mem_k = zeros_beside(q, memory_grad ? MaybeTensor(mem_k) : absent, q.scalar_type());
  Tensor grad_mem_v = zeros_beside(q, memory_grad ? MaybeTensor(mem_v) : absent, q.scalar_type());
  Tensor grad_mem_bias = zeros_beside(q, bias_grad ? mem_bias : absent, ScalarType::Float);
  p.grad_q = grad_q.mutable_data_ptr();
  p.grad_k = k ? grad_k.mutable_data_ptr() : nullptr;
  p.grad_v = k ? grad_v.mutable_data_ptr() : nullptr;
  // Null means not wanted; without slots there is nothing to want.
  const bool records = memory_grad && mem_k.numel() > 0;
  p.grad_mem_k = records ? grad_mem_k.mutable_data_ptr() : nullptr;
  p.grad_mem_v = records ? grad_mem_v.mutable_data_ptr() : nullptr;
  p.grad_mem_bias = records && bias_grad ? grad_mem_bias.mutable_data_ptr<float>() : nullptr;
  const Tensor work = workspace_beside(q, m3_memory_attention_backward_cuda_workspace(&p));
  check_cuda(m3_memory_attention_backward_cuda(&p, work.mutable_data_ptr(), current_stream(q)));
  return {std::move(grad_q),     std::move(grad_k),     std::move(grad_v),
          std::move(grad_mem_k), std::move(grad_mem_v), std::move(grad_mem_bias)};
}

}  // namespace
}  // namespace m3::binding

M3_REGISTER_CUDA(memory_attention_backward, memory_attention_backward_cuda)
