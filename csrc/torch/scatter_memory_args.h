// The arguments of scatter_memory, checked, as its launchers take them.
#pragma once

#include "m3/scatter_memory.h"
#include "torch/tensor_args.h"

namespace m3::binding {

// Keeps alive what `params` points into.
struct ScatterArgs {
  Tensor slots;
  M3ScatterMemoryParams params{};

  ScatterArgs(const Tensor& arena, const Tensor& records, const Tensor& slot) {
    STD_TORCH_CHECK(arena.dim() >= 1 && arena.dim() <= M3_SCATTER_MAX_DIMS,
                    "arena: expected shape [S, ...] of at most ", M3_SCATTER_MAX_DIMS, " dimensions, got ",
                    shape_of(arena));
    bool same = records.dim() == arena.dim();
    for (int64_t d = 1; same && d < arena.dim(); ++d) same = records.size(d) == arena.size(d);
    if (!same) {
      std::string wanted = "[*";
      for (int64_t d = 1; d < arena.dim(); ++d) wanted += ", " + std::to_string(arena.size(d));
      STD_TORCH_CHECK(false, "records: expected shape ", wanted, "], got ", shape_of(records));
    }
    expect_type(records, "records", arena.scalar_type());
    expect_shape(slot, "slots", {records.size(0)});
    expect_type(slot, "slots", ScalarType::Int);
    slots = as_contiguous(slot);
    M3ScatterMemoryParams& p = params;
    p.slots = arena.size(0), p.records = records.size(0), p.dims = arena.dim() - 1;
    p.element_size = static_cast<int64_t>(arena.element_size());
    p.record = records.const_data_ptr(), p.slot = slots.const_data_ptr<int32_t>(), p.arena = arena.mutable_data_ptr();
    p.slot_stride = arena.stride(0), p.record_stride = records.stride(0);
    for (int64_t d = 0; d < p.dims; ++d) {
      p.size[d] = arena.size(d + 1);
      p.arena_strides[d] = arena.stride(d + 1), p.record_strides[d] = records.stride(d + 1);
    }
  }
};

}  // namespace m3::binding
