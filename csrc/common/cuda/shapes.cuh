// Which calls the CUDA kernels take: element types, head dimensions, alignment. Everything else is M3_UNSUPPORTED.
#pragma once

#include <type_traits>

#include "common/cuda/launch.cuh"

namespace m3::gpu {

inline int64_t align16(int64_t bytes) { return (bytes + 15) / 16 * 16; }

inline bool rows_at_16_bytes(const void* first, const int64_t* strides, int count) {
  bool good = reinterpret_cast<uintptr_t>(first) % 16 == 0;
  for (int i = 0; i < count; ++i) good = good && strides[i] % 8 == 0;
  return good;
}

inline m3_status check_rows(const char* name, const void* first, const int64_t* strides, int count) {
  if (rows_at_16_bytes(first, strides, count)) return M3_OK;
  return fail(M3_UNSUPPORTED, "%s: expected rows at multiples of 16 bytes for the CUDA kernel", name);
}

#define M3_GPU_TRY(call)                        \
  do {                                          \
    const m3_status m3_status_ = (call);        \
    if (m3_status_ != M3_OK) return m3_status_; \
  } while (0)

// The element types and head dimensions that are compiled: fn(T{}, std::integral_constant<int, D>{}). M3_ONE_SHAPE
// leaves one of each, for quick proofs.
template <class Fn>
m3_status with_shape(m3_dtype dtype, int64_t dim, const Fn& fn) {
  const auto with_dim = [&](auto type) -> m3_status {
    if (dim == 80) return fn(type, std::integral_constant<int, 80>{});
#if !defined(M3_ONE_SHAPE)
    if (dim == 64) return fn(type, std::integral_constant<int, 64>{});
    if (dim == 128) return fn(type, std::integral_constant<int, 128>{});
#endif
    return fail(M3_UNSUPPORTED, "q: expected a head dimension of 64, 80 or 128 for the CUDA kernel, got %lld",
                static_cast<long long>(dim));
  };
  if (dtype == M3_BF16) return with_dim(Bf16{});
#if !defined(M3_ONE_SHAPE)
  if (dtype == M3_F16) return with_dim(Fp16{});
#endif
  return fail(M3_UNSUPPORTED, "q: expected bfloat16 or float16 for the CUDA kernel");
}

}  // namespace m3::gpu
