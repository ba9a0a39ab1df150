#include "torch/cuda/decode_outputs.h"
#include "torch/cuda/decode_values.h"

namespace m3::binding {
namespace {

std::tuple<Tensor, Tensor, Tensor> memory_decode_cuda(const Tensor& q, const Tensor& k_cache, const Tensor& v_cache,
                                                      const Tensor& kv_len, const MaybeTensor& block_table,
                                                      const Tensor& cu_q, const Tensor& mem_k, const Tensor& mem_v,
                                                      const Tensor& mem_slot, const Tensor& mem_len,
                                                      const MaybeTensor& mem_bias, const MaybeTensor& head_map,
                                                      double scale, int64_t max_q, int64_t max_kv) {
  DecodeArgs args;
  M3MemoryDecodeParams& p =
      decode_args(args, q, k_cache, v_cache, kv_len, block_table, cu_q, scale, max_q, max_kv);
  dense_records(args.records, q, mem_k, mem_v, mem_slot, mem_len, mem_bias, head_map, p.sequences, p.kv_heads);
  p.memory = args.records.view;
  check_decode_values(args, p);
  auto [out, lse, mass] = decode_outputs_beside(p, q);
  const Tensor work = workspace_beside(q, m3_memory_decode_cuda_workspace(&p));
  check_cuda(m3_memory_decode_cuda(&p, work.mutable_data_ptr(), current_stream(q)));
  return {std::move(out), std::move(lse), std::move(mass)};
}

}  // namespace
}  // namespace m3::binding

M3_REGISTER_CUDA(memory_decode, memory_decode_cuda)
