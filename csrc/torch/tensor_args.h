// What every binding needs: checks that name the argument, the expectation and the value; dtype and status translation.
// Only memory safety is checked here (device, dtype, shape, stride); value ranges of index tensors are the core's.
#pragma once

#include <initializer_list>
#include <optional>
#include <string>
#include <tuple>

#include "m3/api.h"
#include "torch/box.h"
#include "torch/direct.h"

namespace m3::binding {

inline std::string shape_of(const Tensor& t) {
  std::string s = "[";
  for (int64_t i = 0; i < t.dim(); ++i) s += (i ? ", " : "") + std::to_string(t.size(i));
  return s + "]";
}

// The element type for the core; an error that names the alternatives for anything else.
inline m3_dtype element_type(const Tensor& t, const char* name) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return M3_F32;
    case ScalarType::Half: return M3_F16;
    case ScalarType::BFloat16: return M3_BF16;
    default: break;
  }
  STD_TORCH_CHECK(false, name, ": expected float32, float16 or bfloat16 for the native kernel, got ",
                  torch::headeronly::toString(t.scalar_type()),
                  "; memory3_kernels.use_backend(\"reference\") takes float64");
  return M3_F32;
}

// The same for what an op is asked to return.
inline m3_dtype output_type(ScalarType type, const char* name = "dtype") {
  switch (type) {
    case ScalarType::Float: return M3_F32;
    case ScalarType::Half: return M3_F16;
    case ScalarType::BFloat16: return M3_BF16;
    default: break;
  }
  STD_TORCH_CHECK(false, name, ": expected float32, bfloat16 or float16, got ", torch::headeronly::toString(type));
  return M3_F32;
}

inline void expect_type(const Tensor& t, const char* name, ScalarType type) {
  STD_TORCH_CHECK(t.scalar_type() == type, name, ": expected ", torch::headeronly::toString(type), ", got ",
                  torch::headeronly::toString(t.scalar_type()));
}

// -1 in `shape` accepts any size.
inline void expect_shape(const Tensor& t, const char* name, std::initializer_list<int64_t> shape) {
  bool good = t.dim() == static_cast<int64_t>(shape.size());
  int64_t i = 0;
  for (int64_t want : shape) {
    if (!good) break;
    good = want < 0 || t.size(i) == want;
    ++i;
  }
  if (good) return;
  std::string want = "[";
  i = 0;
  for (int64_t n : shape) want += (i++ ? ", " : "") + (n < 0 ? std::string("*") : std::to_string(n));
  STD_TORCH_CHECK(false, name, ": expected shape ", want, "], got ", shape_of(t));
}

inline void expect_unit_stride(const Tensor& t, const char* name) {
  const int64_t last = t.dim() - 1;
  STD_TORCH_CHECK(t.numel() == 0 || t.size(last) == 1 || t.stride(last) == 1, name,
                  ": expected a last stride of 1, got ", t.stride(last));
}

inline void check(m3_status status) { STD_TORCH_CHECK(status == M3_OK, m3_last_error()); }

}  // namespace m3::binding

// Registers `function` as the CPU kernel of memory3::op, and of its twin without autograd that calls outside of a graph
// take, and for calls from Python that need no dispatcher. The schemas are defined in Python (memory3_kernels/_registry.py).
#define M3_REGISTER_CPU(op, function)                            \
  STABLE_TORCH_LIBRARY_IMPL(memory3, CPU, m) {                   \
    m.impl(#op, &::m3::binding::boxed_kernel<&function>);        \
  }                                                              \
  STABLE_TORCH_LIBRARY_IMPL(memory3_forward, CPU, m) {           \
    m.impl(#op, &::m3::binding::boxed_kernel<&function>);        \
  }                                                              \
  [[maybe_unused]] static const bool op##_is_direct = ::m3::binding::add_direct<&function>(#op);
