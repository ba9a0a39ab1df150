// 2^x for the softmax of a score, x <= 0, for `*.simd.cpp` files: the fewest instructions that fp32 sums do not notice.
#pragma once

#include "common/vec.h"

namespace m3 {
namespace M3_LEVEL {
namespace {

// Below it powers stay at 2^-120, relative to a row's largest 1: no term of that size changes an fp32 sum.
constexpr float kPowerFloor = -120.f;

#if defined(__AMX_BF16__)

// Relative error < 3e-6: a polynomial fitted for 2^r on [0, 1) times 2^floor(x), each end of which is one instruction
// of a single step on CPUs with tile registers (on other ones of AVX-512 it is two or more). Results below 2^-126 take
// 70 times as long unless they are flushed to zero.
struct Power {
  F32 operator()(F32 x) const {
    const F32 r = reinterpret_cast<F32>(_mm512_reduce_ps(reinterpret_cast<__m512>(x), 0x9));  // above the floor
    F32 p = splat(0.013534168f);
    p = p * r + 0.05201146f;
    p = p * r + 0.24144276f;
    p = p * r + 0.69300383f;
    p = p * r + 1.0000026f;
    return reinterpret_cast<F32>(_mm512_scalef_ps(reinterpret_cast<__m512>(p), reinterpret_cast<__m512>(x)));
  }
};

#elif defined(__AVX512F__)

// Relative error < 1e-6. With N = round(16 x) and r = x - N / 16, |r| <= 1/32:
//   2^x = 2^(N / 16) 2^r,  2^r = k ((r + a)^2 + b), k and b fitted for the least relative error (7e-7);
// a = 23/16, near 1 / ln 2, is a multiple of 1/16, so that r + a takes one subtraction. Adding 1.5 * 2^19 leaves N in
// the low bits of the sum; shifted by 19 they are the exponent of 2^(N / 16), plus 2^19 times N modulo 16, which the
// table holds too little.
struct Power {
  F32 table;  // bits of k 2^(j / 16), less j << 19
  Power() {
    static const uint32_t kBits[16] = {
        0x3e76e633u, 0x3e78ea4au, 0x3e769f6du, 0x3e749540u, 0x3e72cea2u, 0x3e714e8fu, 0x3e701827u, 0x3e6f2eadu,
        0x3e6e9589u, 0x3e6e5049u, 0x3e6e62a5u, 0x3e6ed07du, 0x3e6f9ddeu, 0x3e70cf03u, 0x3e726858u, 0x3e746e77u};
    table = reinterpret_cast<F32>(load_pairs(kBits));
  }
  F32 operator()(F32 x) const {
    const F32 t = _mm512_max_ps(splat(kPowerFloor), x);  // in this order a NaN stays
    const F32 shifted = t + 786432.f;
    const F32 u = t - (shifted - (786432.f + 1.4375f));
    const F32 scale = reinterpret_cast<F32>(_mm512_permutexvar_ps(reinterpret_cast<__m512i>(shifted), table));
    const U32 bits = (reinterpret_cast<U32>(shifted) << 19) + reinterpret_cast<U32>(scale);
    return (u * u + 2.0810337f) * reinterpret_cast<F32>(bits);
  }
};

#else

// Relative error < 2e-7: 2^x = 2^n 2^r with n = round(x), |r| <= 1/2, and a polynomial fitted for 2^r.
struct Power {
  F32 operator()(F32 x) const {
    const F32 t = max(splat(kPowerFloor), x);  // in this order a NaN stays
    const F32 shifted = t + 12582912.f;        // 1.5 * 2^23: the sum rounds to an integer in the low mantissa
    const F32 r = t - (shifted - 12582912.f);
    F32 p = splat(0.00132765f);
    p = p * r + 0.00967554f;
    p = p * r + 0.05550713f;
    p = p * r + 0.2402212f;
    p = p * r + 0.69314697f;
    p = p * r + 1.00000007f;
    return reinterpret_cast<F32>(reinterpret_cast<U32>(p) + (reinterpret_cast<U32>(shifted) << 23));
  }
};

#endif

}  // namespace
}  // namespace M3_LEVEL
}  // namespace m3
