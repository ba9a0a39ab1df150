// M3_DEBUG=1 for memory_decode and memory_decode_coded: the checks of the CPU launcher, on copies of the index tensors.
#pragma once

#include "torch/cuda/values.h"
#include "torch/memory_decode_args.h"

namespace m3::binding {

inline Tensor on_host(const Tensor& t) {
  return Tensor(torch::stable::to(t, torch::stable::Device(torch::headeronly::DeviceType::CPU)));
}

// `p`: filled but for the outputs. Waits for the device; not for graph capture.
inline void check_decode_values(const DecodeArgs& args, M3MemoryDecodeParams p) {
  if (!checks_values()) return;
  const Tensor cu_q = on_host(args.cu_q), kv_len = on_host(args.kv_len), slot = on_host(args.records.slot),
               length = on_host(args.records.length);
  p.cu_q = cu_q.const_data_ptr<int32_t>(), p.kv_len = kv_len.const_data_ptr<int32_t>();
  p.memory.slot = slot.const_data_ptr<int32_t>(), p.memory.length = length.const_data_ptr<int32_t>();
  Tensor table, head_map;
  if (args.block_table && args.block_table->numel() > 0)
    table = on_host(*args.block_table), p.block_table = table.const_data_ptr<int32_t>();
  if (args.records.head_map)
    head_map = on_host(*args.records.head_map), p.memory.head_map = head_map.const_data_ptr<int32_t>();
  check(m3_memory_decode_check(&p));
}

}  // namespace m3::binding
