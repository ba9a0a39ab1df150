// Run-time choice of the SIMD level. Kernels live in `<op>/<op>.simd.cpp`, which the build compiles once per level with
// that level's flags and M3_LEVEL set to `none`, `avx2`, `avx512`, `avx512bf16` or `amx`; the launcher `<op>/<op>.cpp` is
// compiled once for the baseline and picks with M3_AT_LEVEL. One ISA per translation unit: a wide copy of an inline
// function can never replace the baseline one at link time.
#pragma once

namespace m3 {

enum class SimdLevel { kNone = 0, kAvx2 = 1, kAvx512 = 2, kAvx512Bf16 = 3, kAmx = 4 };

SimdLevel simd_level();

// Whether memory that is read in long stretches arrives faster in the second-level cache than in the first one.
bool far_is_faster();

}  // namespace m3

#if defined(M3_HAVE_X86_LEVELS)
// Declares `result name(args...)` in the namespaces m3::none, m3::avx2, ... of all levels.
#define M3_DECLARE_LEVELS(result, name, ...)                      \
  namespace m3 {                                                  \
  namespace none { result name(__VA_ARGS__); }                    \
  namespace avx2 { result name(__VA_ARGS__); }                    \
  namespace avx512 { result name(__VA_ARGS__); }                  \
  namespace avx512bf16 { result name(__VA_ARGS__); }              \
  namespace amx { result name(__VA_ARGS__); }                     \
  }
#define M3_AT_LEVEL(name)                                              \
  (::m3::simd_level() == ::m3::SimdLevel::kAmx ? ::m3::amx::name \
   : ::m3::simd_level() == ::m3::SimdLevel::kAvx512Bf16 ? ::m3::avx512bf16::name \
   : ::m3::simd_level() == ::m3::SimdLevel::kAvx512   ? ::m3::avx512::name     \
   : ::m3::simd_level() == ::m3::SimdLevel::kAvx2     ? ::m3::avx2::name       \
                                                      : ::m3::none::name)
#else
#define M3_DECLARE_LEVELS(result, name, ...) \
  namespace m3 { namespace none { result name(__VA_ARGS__); } }
#define M3_AT_LEVEL(name) (::m3::none::name)
#endif
