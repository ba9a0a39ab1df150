// 2^x for softmaxes at level amx, for `*.simd.cpp` files.
#pragma once

#include "common/vec.h"

namespace m3 {
namespace M3_LEVEL {
namespace {

#if defined(__AMX_BF16__)

// Relative error < 2e-7; below 2^-126, where results would be denormal and slow, 0. The processor splits x into its
// floor and the rest and puts the former into the exponent: what is left is a polynomial for 2^r, 0 <= r < 1.
inline F32 power_masked(__mmask16 keep, F32 x) {
  const F32 r = reinterpret_cast<F32>(_mm512_reduce_ps(reinterpret_cast<__m512>(x), 0x9));
  F32 p = splat(0.00187757669f);
  p = p * r + 0.00898933969f;
  p = p * r + 0.0558263175f;
  p = p * r + 0.240153611f;
  p = p * r + 0.693153083f;
  p = p * r + 0.99999994f;
  return reinterpret_cast<F32>(_mm512_maskz_scalef_ps(keep, reinterpret_cast<__m512>(p), reinterpret_cast<__m512>(x)));
}

inline __mmask16 representable(F32 x) {  // NaNs, too
  return _mm512_cmp_ps_mask(reinterpret_cast<__m512>(x), reinterpret_cast<__m512>(splat(-126.f)), _CMP_NLT_UQ);
}

inline F32 power(F32 x) { return power_masked(representable(x), x); }

// 0 where the mask is.
inline F32 power_where(I32 mask, F32 x) {
  const __m512i bits = reinterpret_cast<__m512i>(mask);
  return power_masked(_mm512_test_epi32_mask(bits, bits) & representable(x), x);
}

// Two vectors of weights >= 0 as bf16, to nearest: lane i is (even[i], odd[i]). Ties go up, which saves two of six
// instructions that to even takes.
inline U32 round_pairs(F32 even, F32 odd) {
  return (reinterpret_cast<U32>(even) + 0x8000u) >> 16 | ((reinterpret_cast<U32>(odd) + 0x8000u) & 0xffff0000u);
}

#endif

}  // namespace
}  // namespace M3_LEVEL
}  // namespace m3
