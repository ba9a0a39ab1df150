#include "torch/cuda/attention_values.h"

namespace m3::binding {
namespace {

std::tuple<Tensor, Tensor, Tensor> memory_attention_cuda(
    const Tensor& q, const MaybeTensor& k, const MaybeTensor& v, const Tensor& cu_q, const Tensor& cu_k,
    const Tensor& cu_chunk, const Tensor& mem_k, const Tensor& mem_v, const Tensor& mem_slot, const Tensor& mem_len,
    const MaybeTensor& mem_bias, const MaybeTensor& head_map, double scale, int64_t max_q, int64_t max_k,
    int64_t max_chunk) {
  AttentionArgs args;
  M3MemoryAttentionParams& p = attention_args(args, q, k, v, cu_q, cu_k, cu_chunk, mem_k, mem_v, mem_slot, mem_len,
                                              mem_bias, head_map, scale, max_q, max_k, max_chunk);
  check_attention_values(args, p);
  Tensor out = empty_beside(q, {p.rows, p.heads, p.dim}, q.scalar_type());
  Tensor lse = empty_beside(q, {p.rows, p.heads}, ScalarType::Float);
  Tensor mass = empty_beside(q, {p.rows, p.heads, p.memory.refs}, ScalarType::Float);
  p.out = out.mutable_data_ptr();
  p.lse = lse.mutable_data_ptr<float>();
  p.mass = mass.mutable_data_ptr<float>();
  check_cuda(m3_memory_attention_cuda(&p, current_stream(q)));
  return {std::move(out), std::move(lse), std::move(mass)};
}

}  // namespace
}  // namespace m3::binding

M3_REGISTER_CUDA(memory_attention, memory_attention_cuda)
