#include "torch/memory_decode_coded_args.h"

namespace m3::binding {
namespace {

std::tuple<Tensor, Tensor, Tensor> memory_decode_coded(
    const Tensor& q, const Tensor& k_cache, const Tensor& v_cache, const Tensor& kv_len, const MaybeTensor& block_table,
    const Tensor& cu_q, const Tensor& mem_k_codes, const Tensor& mem_v_codes, const Tensor& mem_slot,
    const Tensor& mem_len, const MaybeTensor& mem_bias, const MaybeTensor& head_map, const Tensor& k_coarse,
    const Tensor& k_fine, const MaybeTensor& k_rot, const Tensor& v_coarse, const Tensor& v_fine,
    const MaybeTensor& v_rot, int64_t tokens, double scale, int64_t max_q, int64_t max_kv) {
  CodedDecodeArgs args(q, k_cache, v_cache, kv_len, block_table, cu_q, mem_k_codes, mem_v_codes, mem_slot, mem_len,
                       mem_bias, head_map, k_coarse, k_fine, k_rot, v_coarse, v_fine, v_rot, tokens, scale, max_q,
                       max_kv);
  M3MemoryDecodeCodedParams& p = args.params;
  std::tuple<Tensor, Tensor, Tensor> outputs = decode_outputs(p.decode, q);
  check(m3_memory_decode_coded_cpu(&p));
  return outputs;
}

}  // namespace
}  // namespace m3::binding

M3_REGISTER_CPU(memory_decode_coded, m3::binding::memory_decode_coded)
