#include "m3/memory_attention.h"

#include "torch/memory_attention_args.h"

namespace m3::binding {
namespace {

std::tuple<Tensor, Tensor, Tensor> memory_attention(
    const Tensor& q, const MaybeTensor& k, const MaybeTensor& v, const Tensor& cu_q, const Tensor& cu_k,
    const Tensor& cu_chunk, const Tensor& mem_k, const Tensor& mem_v, const Tensor& mem_slot, const Tensor& mem_len,
    const MaybeTensor& mem_bias, const MaybeTensor& head_map, double scale, int64_t max_q, int64_t max_k,
    int64_t max_chunk) {
  AttentionArgs args;
  M3MemoryAttentionParams& p = attention_args(args, q, k, v, cu_q, cu_k, cu_chunk, mem_k, mem_v, mem_slot, mem_len,
                                              mem_bias, head_map, scale, max_q, max_k, max_chunk);
  Tensor out = empty_cpu({p.rows, p.heads, p.dim}, q.scalar_type());
  Tensor lse = empty_cpu({p.rows, p.heads}, ScalarType::Float);
  Tensor mass = empty_cpu({p.rows, p.heads, p.memory.refs}, ScalarType::Float);
  p.out = out.mutable_data_ptr();
  p.lse = lse.mutable_data_ptr<float>();
  p.mass = mass.mutable_data_ptr<float>();
  check(m3_memory_attention_cpu(&p));
  return {std::move(out), std::move(lse), std::move(mass)};
}

}  // namespace
}  // namespace m3::binding

M3_REGISTER_CPU(memory_attention, m3::binding::memory_attention)
