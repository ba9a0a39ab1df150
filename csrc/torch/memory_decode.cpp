#include "m3/memory_decode.h"

#include "torch/memory_decode_args.h"

namespace m3::binding {
namespace {

std::tuple<Tensor, Tensor, Tensor> memory_decode(const Tensor& q, const Tensor& k_cache, const Tensor& v_cache,
                                                 const Tensor& kv_len, const MaybeTensor& block_table,
                                                 const Tensor& cu_q, const Tensor& mem_k, const Tensor& mem_v,
                                                 const Tensor& mem_slot, const Tensor& mem_len,
                                                 const MaybeTensor& mem_bias, const MaybeTensor& head_map, double scale,
                                                 int64_t max_q, int64_t max_kv) {
  DecodeArgs args;
  M3MemoryDecodeParams& p =
      decode_args(args, q, k_cache, v_cache, kv_len, block_table, cu_q, scale, max_q, max_kv);
  dense_records(args.records, q, mem_k, mem_v, mem_slot, mem_len, mem_bias, head_map, p.sequences, p.kv_heads);
  p.memory = args.records.view;
  std::tuple<Tensor, Tensor, Tensor> outputs = decode_outputs(p, q);
  check(m3_memory_decode_cpu(&p));
  return outputs;
}

}  // namespace
}  // namespace m3::binding

M3_REGISTER_CPU(memory_decode, m3::binding::memory_decode)
