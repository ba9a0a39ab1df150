// The memory operands of the attention bindings: shape, dtype and stride checks, and the core's view of them.
#pragma once

#include "m3/records.h"
#include "torch/tensor_args.h"

namespace m3::binding {

typedef std::optional<Tensor> MaybeTensor;

inline Tensor index_tensor(const Tensor& t, const char* name, std::initializer_list<int64_t> shape) {
  expect_shape(t, name, shape);
  expect_type(t, name, ScalarType::Int);
  return as_contiguous(t);
}

// Offsets [n + 1], n >= 0.
inline Tensor offsets(const Tensor& t, const char* name) {
  Tensor found = index_tensor(t, name, {-1});
  STD_TORCH_CHECK(found.size(0) > 0, name, ": expected at least one offset, got none");
  return found;
}

inline void copy_strides(const Tensor& t, int64_t* strides, int64_t count) {
  for (int64_t i = 0; i < count; ++i) strides[i] = t.stride(i);
}

inline m3_dtype check_query(const Tensor& q) {
  expect_shape(q, "q", {-1, -1, -1});
  const m3_dtype dtype = element_type(q, "q");
  const int64_t dim = q.size(2);
  STD_TORCH_CHECK(dim % 8 == 0 && dim >= 8 && dim <= 256,
                  "q: expected a head dimension that is a multiple of 8 up to 256, got ", dim);
  expect_unit_stride(q, "q");
  return dtype;
}

inline void check_heads(const Tensor& q, int64_t kv_heads) {
  STD_TORCH_CHECK(kv_heads > 0 && q.size(1) % kv_heads == 0 && q.size(1) >= kv_heads,
                  "q: expected a number of heads that is a multiple of the ", kv_heads, " KV heads, got ", q.size(1));
}

// Operands that must stay alive while the core runs: contiguous copies of small index tensors.
struct RecordArgs {
  M3Records view{};
  Tensor slot, length;
  MaybeTensor head_map;
};

// Everything but the keys and values themselves. kv_heads < 0: not given by keys of the context; returns the number.
inline int64_t record_indices(RecordArgs& args, const Tensor& slot, const Tensor& length, const MaybeTensor& bias,
                              const MaybeTensor& head_map, int64_t chunks, int64_t slots, int64_t heads, int64_t tokens,
                              int64_t kv_heads) {
  if (kv_heads < 0) kv_heads = head_map ? head_map->size(0) : heads;
  if (head_map)
    args.head_map = index_tensor(*head_map, "head_map", {kv_heads});
  else
    STD_TORCH_CHECK(heads == kv_heads, "head_map: expected one where records have ", heads, " heads and the model ",
                    kv_heads, " KV heads, got None");
  args.slot = index_tensor(slot, "mem_slot", {chunks, -1});
  args.length = index_tensor(length, "mem_len", {slots});
  M3Records& view = args.view;
  view.slots = slots, view.heads = heads, view.tokens = tokens;
  if (bias) {
    expect_shape(*bias, "mem_bias", {slots, heads, tokens});
    expect_type(*bias, "mem_bias", ScalarType::Float);
    expect_unit_stride(*bias, "mem_bias");
    view.bias = bias->const_data_ptr<float>();
    copy_strides(*bias, view.bias_stride, 2);
  }
  view.chunks = chunks, view.refs = slot.size(1);
  view.slot = args.slot.const_data_ptr<int32_t>();
  view.length = args.length.const_data_ptr<int32_t>();
  view.head_map = args.head_map ? args.head_map->const_data_ptr<int32_t>() : nullptr;
  return kv_heads;
}

// Dense keys and values; returns the number of KV heads.
inline int64_t dense_records(RecordArgs& args, const Tensor& q, const Tensor& mem_k, const Tensor& mem_v,
                             const Tensor& slot, const Tensor& length, const MaybeTensor& bias,
                             const MaybeTensor& head_map, int64_t chunks, int64_t kv_heads) {
  expect_shape(mem_k, "mem_k", {-1, -1, -1, q.size(2)});
  const int64_t slots = mem_k.size(0), heads = mem_k.size(1), tokens = mem_k.size(2);
  expect_shape(mem_v, "mem_v", {slots, heads, tokens, q.size(2)});
  expect_type(mem_k, "mem_k", q.scalar_type());
  expect_type(mem_v, "mem_v", q.scalar_type());
  expect_unit_stride(mem_k, "mem_k");
  expect_unit_stride(mem_v, "mem_v");
  kv_heads = record_indices(args, slot, length, bias, head_map, chunks, slots, heads, tokens, kv_heads);
  check_heads(q, kv_heads);
  args.view.k = mem_k.const_data_ptr();
  args.view.v = mem_v.const_data_ptr();
  copy_strides(mem_k, args.view.k_stride, 3);
  copy_strides(mem_v, args.view.v_stride, 3);
  return kv_heads;
}

}  // namespace m3::binding
