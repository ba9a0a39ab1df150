// Arguments that memory_decode and memory_decode_coded share: queries and cache.
#pragma once

#include "m3/memory_decode.h"
#include "torch/records.h"

namespace m3::binding {

struct DecodeArgs {
  M3MemoryDecodeParams params{};
  RecordArgs records;
  Tensor cu_q, kv_len;
  MaybeTensor block_table;
};

// Checks shapes, dtypes and strides; fills everything but the records and the outputs.
inline M3MemoryDecodeParams& decode_args(DecodeArgs& args, const Tensor& q, const Tensor& k_cache,
                                         const Tensor& v_cache, const Tensor& kv_len, const MaybeTensor& block_table,
                                         const Tensor& cu_q, double scale, int64_t max_q, int64_t max_kv) {
  M3MemoryDecodeParams& p = args.params;
  p.dtype = check_query(q);
  args.cu_q = offsets(cu_q, "cu_q");
  p.rows = q.size(0), p.heads = q.size(1), p.dim = q.size(2), p.sequences = cu_q.size(0) - 1;
  p.q = q.const_data_ptr();
  copy_strides(q, p.q_stride, 2);
  expect_shape(k_cache, "k_cache", {-1, -1, -1, p.dim});
  p.pages = k_cache.size(0), p.page = k_cache.size(1), p.kv_heads = k_cache.size(2);
  expect_shape(v_cache, "v_cache", {p.pages, p.page, p.kv_heads, p.dim});
  expect_type(k_cache, "k_cache", q.scalar_type());
  expect_type(v_cache, "v_cache", q.scalar_type());
  expect_unit_stride(k_cache, "k_cache");
  expect_unit_stride(v_cache, "v_cache");
  p.k_cache = k_cache.const_data_ptr();
  p.v_cache = v_cache.const_data_ptr();
  copy_strides(k_cache, p.k_stride, 3);
  copy_strides(v_cache, p.v_stride, 3);
  args.kv_len = index_tensor(kv_len, "kv_len", {p.sequences});
  if (block_table) {
    args.block_table = index_tensor(*block_table, "block_table", {p.sequences, -1});
    // A pointer even where the table is empty: null means a dense cache.
    static const int32_t nothing = 0;
    p.max_pages = block_table->size(1);
    p.block_table = args.block_table->numel() > 0 ? args.block_table->const_data_ptr<int32_t>() : &nothing;
    STD_TORCH_CHECK(p.page >= 16 && (p.page & (p.page - 1)) == 0,
                    "k_cache: expected pages of a power of two of at least 16 tokens, got ", p.page);
  } else {
    STD_TORCH_CHECK(p.pages == p.sequences, "k_cache: expected ", p.sequences, " sequences (rows of kv_len), got ",
                    p.pages);
  }
  STD_TORCH_CHECK(max_q <= 16, "max_q: expected at most 16 new tokens per sequence, got ", max_q,
                  "; use memory_attention for longer ones");
  p.cu_q = args.cu_q.const_data_ptr<int32_t>();
  p.kv_len = args.kv_len.const_data_ptr<int32_t>();
  p.scale = static_cast<float>(scale);
  p.max_q = max_q, p.max_kv = max_kv;
  return p;
}

// out, lse, mass; call after the records are set.
inline std::tuple<Tensor, Tensor, Tensor> decode_outputs(M3MemoryDecodeParams& p, const Tensor& q) {
  Tensor out = empty_cpu({p.rows, p.heads, p.dim}, q.scalar_type());
  Tensor lse = empty_cpu({p.rows, p.heads}, ScalarType::Float);
  Tensor mass = empty_cpu({p.rows, p.heads, p.memory.refs}, ScalarType::Float);
  p.out = out.mutable_data_ptr();
  p.lse = lse.mutable_data_ptr<float>();
  p.mass = mass.mutable_data_ptr<float>();
  return {std::move(out), std::move(lse), std::move(mass)};
}

}  // namespace m3::binding
