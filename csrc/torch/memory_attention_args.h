// Arguments that memory_attention and its gradient share.
#pragma once

#include "m3/memory_attention.h"
#include "torch/records.h"

namespace m3::binding {

struct AttentionArgs {
  M3MemoryAttentionParams params{};
  RecordArgs records;
  Tensor cu_q, cu_k, cu_chunk;
};

// Checks shapes, dtypes and strides; fills everything but the outputs.
inline M3MemoryAttentionParams& attention_args(
    AttentionArgs& args, const Tensor& q, const MaybeTensor& k, const MaybeTensor& v, const Tensor& cu_q,
    const Tensor& cu_k, const Tensor& cu_chunk, const Tensor& mem_k, const Tensor& mem_v, const Tensor& mem_slot,
    const Tensor& mem_len, const MaybeTensor& mem_bias, const MaybeTensor& head_map, double scale, int64_t max_q,
    int64_t max_k, int64_t max_chunk) {
  M3MemoryAttentionParams& p = args.params;
  p.dtype = check_query(q);
  STD_TORCH_CHECK(k.has_value() == v.has_value(), "v: expected k and v both given or both None, got one of them");
  args.cu_q = offsets(cu_q, "cu_q");
  args.cu_k = index_tensor(cu_k, "cu_k", {cu_q.size(0)});
  args.cu_chunk = offsets(cu_chunk, "cu_chunk");
  p.rows = q.size(0), p.heads = q.size(1), p.dim = q.size(2), p.sequences = cu_q.size(0) - 1;
  p.q = q.const_data_ptr();
  copy_strides(q, p.q_stride, 2);
  if (k) {
    expect_shape(*k, "k", {-1, -1, p.dim});
    expect_shape(*v, "v", {k->size(0), k->size(1), p.dim});
    expect_type(*k, "k", q.scalar_type());
    expect_type(*v, "v", q.scalar_type());
    expect_unit_stride(*k, "k");
    expect_unit_stride(*v, "v");
    p.keys = k->size(0);
    // A pointer even where there are no rows: null means that no context was given.
    static const char nothing = 0;
    p.k = p.keys > 0 ? k->const_data_ptr() : &nothing;
    p.v = p.keys > 0 ? v->const_data_ptr() : &nothing;
    copy_strides(*k, p.k_stride, 2);
    copy_strides(*v, p.v_stride, 2);
  }
  p.kv_heads = dense_records(args.records, q, mem_k, mem_v, mem_slot, mem_len, mem_bias, head_map,
                             cu_chunk.size(0) - 1, k ? k->size(1) : -1);
  p.memory = args.records.view;
  p.cu_q = args.cu_q.const_data_ptr<int32_t>();
  p.cu_k = args.cu_k.const_data_ptr<int32_t>();
  p.cu_chunk = args.cu_chunk.const_data_ptr<int32_t>();
  p.scale = static_cast<float>(scale);
  p.max_q = max_q, p.max_k = max_k, p.max_chunk = max_chunk;
  return p;
}

}  // namespace m3::binding
