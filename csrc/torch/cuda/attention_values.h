// M3_DEBUG=1 for memory_attention and its gradient: the checks of the CPU launcher, on copies of the index tensors.
#pragma once

#include "torch/cuda/values.h"
#include "torch/memory_attention_args.h"

namespace m3::binding {

// `p`: filled but for the outputs. Waits for the device; not for graph capture.
inline void check_attention_values(const AttentionArgs& args, M3MemoryAttentionParams p) {
  if (!checks_values()) return;
  const auto on_host = [](const Tensor& t) {
    return Tensor(torch::stable::to(t, torch::stable::Device(torch::headeronly::DeviceType::CPU)));
  };
  const Tensor cu_q = on_host(args.cu_q), cu_k = on_host(args.cu_k), cu_chunk = on_host(args.cu_chunk),
               slot = on_host(args.records.slot), length = on_host(args.records.length);
  p.cu_q = cu_q.const_data_ptr<int32_t>(), p.cu_k = cu_k.const_data_ptr<int32_t>();
  p.cu_chunk = cu_chunk.const_data_ptr<int32_t>();
  p.memory.slot = slot.const_data_ptr<int32_t>(), p.memory.length = length.const_data_ptr<int32_t>();
  Tensor head_map;
  if (args.records.head_map)
    head_map = on_host(*args.records.head_map), p.memory.head_map = head_map.const_data_ptr<int32_t>();
  check(m3_memory_attention_check(&p));
}

}  // namespace m3::binding
