// Portable SIMD for `*.simd.cpp` files: one kernel source, compiled once per level. A vector holds kLanes floats:
// 4 at `none` (SSE2 or NEON), 8 at `avx2`, 16 at `avx512`, `avx512bf16` (which adds dot products of bf16 pairs) and
// `amx` (which adds tiles of them, and of bytes, common/tile_gemm.h). GCC/Clang vector extensions give + - * / and
// comparisons; this header adds what they lack: conversions, reductions, exp.
//
// Only <immintrin.h> and plain C headers may be included beside this file in a `*.simd.cpp` (no std templates: a wide
// instantiation of an inline function could replace the baseline one at link time). Everything is level-local.
#pragma once

#include <stdint.h>
#include <string.h>

#if defined(__AVX2__) || defined(__AVX512F__)
#include <immintrin.h>
#endif

#include "m3/api.h"

// Makes the compiler forget where a vector's value came from: it then keeps it in a register.
#if defined(M3_EMULATE_AVX512) || !defined(__x86_64__)
#define M3_OPAQUE(vector) asm volatile("" : "+m"(vector))
#elif defined(__AVX512F__)
#define M3_OPAQUE(vector) asm volatile("" : "+v"(vector))
#else
#define M3_OPAQUE(vector) asm volatile("" : "+x"(vector))
#endif

#ifndef M3_LEVEL
#error "vec.h belongs into *.simd.cpp files, which the build compiles with -DM3_LEVEL=..."
#endif

namespace m3 {
namespace M3_LEVEL {
namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float F32 __attribute__((vector_size(4 * kLanes)));
typedef int32_t I32 __attribute__((vector_size(4 * kLanes)));
typedef uint32_t U32 __attribute__((vector_size(4 * kLanes)));
typedef uint16_t U16 __attribute__((vector_size(2 * kLanes)));

constexpr float kInf = __builtin_inff();

inline F32 splat(float x) { return x - F32{}; }

struct BF16 { uint16_t bits; };
struct F16 { uint16_t bits; };

// ---- scalar conversions ------------------------------------------------------------------------------------------

inline float to_float(float x) { return x; }

inline float to_float(BF16 x) {
  const uint32_t u = static_cast<uint32_t>(x.bits) << 16;
  float f;
  memcpy(&f, &u, 4);
  return f;
}

inline float to_float(F16 x) {
#if defined(__F16C__)
  return _cvtsh_ss(x.bits);
#else
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16, rest = x.bits & 0x7fffu;
  uint32_t u;
  if (rest >= 0x7c00u) {
    u = sign | 0x7f800000u | ((rest & 0x3ffu) << 13);
  } else if (rest >= 0x400u) {
    u = sign | ((rest << 13) + 0x38000000u);
  } else {  // subnormal: rest * 2^-24
    const float f = static_cast<float>(rest) * 0x1p-24f;
    memcpy(&u, &f, 4);
    u |= sign;
  }
  float f;
  memcpy(&f, &u, 4);
  return f;
#endif
}

inline void from_float(float x, float* out) { *out = x; }

inline void from_float(float x, BF16* out) {
  uint32_t u;
  memcpy(&u, &x, 4);
  out->bits = x != x ? 0x7fc0 : static_cast<uint16_t>((u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
}

inline void from_float(float x, F16* out) {
#if defined(__F16C__)
  out->bits = _cvtss_sh(x, 0);
#else
  uint32_t u;
  memcpy(&u, &x, 4);
  const uint32_t sign = (u >> 16) & 0x8000u;
  u &= 0x7fffffffu;
  uint32_t h;
  if (u > 0x7f800000u) {
    h = 0x7e00u;
  } else if (u >= 0x477ff000u) {  // rounds to 65536 or beyond
    h = 0x7c00u;
  } else if (u >= 0x38800000u) {
    h = (u - 0x38000000u + 0xfffu + ((u >> 13) & 1u)) >> 13;
  } else {  // subnormal: adding 0.5 lines the mantissa up and rounds to nearest even
    float f;
    memcpy(&f, &u, 4);
    f += 0.5f;
    memcpy(&h, &f, 4);
    h -= 0x3f000000u;
  }
  out->bits = static_cast<uint16_t>(sign | h);
#endif
}

// ---- kLanes elements at a time -------------------------------------------------------------------------------------

inline F32 load(const float* p) {
  F32 v;
  memcpy(&v, p, sizeof v);
  return v;
}

inline F32 load(const BF16* p) {
#if defined(__AVX2__) && !defined(__AVX512F__)  // GCC widens eight in two halves
  return reinterpret_cast<F32>(
      _mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))), 16));
#else
  U16 h;
  memcpy(&h, p, sizeof h);
  return reinterpret_cast<F32>(__builtin_convertvector(h, U32) << 16);
#endif
}

inline F32 load(const F16* p) {
#if defined(__AVX512F__)
  return reinterpret_cast<F32>(_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
#elif defined(__AVX2__)
  return reinterpret_cast<F32>(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#else
  F32 v;
  for (int i = 0; i < kLanes; ++i) v[i] = to_float(p[i]);
  return v;
#endif
}

// Half a vector, the upper lanes 0: the end of a row whose length is a multiple of 8 but not of kLanes.
template <class T>
inline F32 load_half(const T* p) {
  T padded[kLanes] = {};
  memcpy(padded, p, sizeof(T) * kLanes / 2);
  return load(padded);
}

inline void store(float* p, F32 v) { memcpy(p, &v, sizeof v); }

inline void store(BF16* p, F32 v) {
#if defined(__AVX512BF16__)
  const __m256bh h16 = _mm512_cvtneps_pbh(reinterpret_cast<__m512>(v));
  memcpy(p, &h16, sizeof h16);
#else
  const U32 u = reinterpret_cast<U32>(v);
  const U32 rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  const U32 nan = reinterpret_cast<U32>(v != v);
  const U16 h = __builtin_convertvector((rounded & ~nan) | (nan & 0x7fc0u), U16);
  memcpy(p, &h, sizeof h);
#endif
}

inline void store(F16* p, F32 v) {
#if defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(reinterpret_cast<__m512>(v), 0));
#elif defined(__AVX2__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(reinterpret_cast<__m256>(v), 0));
#else
  for (int i = 0; i < kLanes; ++i) from_float(v[i], p + i);
#endif
}

template <class T>
inline void store_half(T* p, F32 v) {
  T whole[kLanes];
  store(whole, v);
  memcpy(p, whole, sizeof(T) * kLanes / 2);
}

// ---- pairs of bf16 ---------------------------------------------------------------------------------------------------
// A U32 lane holds two bf16 values, the even one in the low half: what lies in memory as bf16 [2 * kLanes].

inline U32 load_pairs(const void* p) {
  U32 v;
  memcpy(&v, p, sizeof v);
  return v;
}

inline F32 low(U32 pairs) { return reinterpret_cast<F32>(pairs << 16); }
inline F32 high(U32 pairs) { return reinterpret_cast<F32>(pairs & 0xffff0000u); }

// Rounds two vectors to bf16, to nearest even: lane i is (even[i], odd[i]).
inline U32 make_pairs(F32 even, F32 odd) {
  BF16 e[kLanes], o[kLanes];
  store(e, even);
  store(o, odd);
  U16 a, b;
  memcpy(&a, e, sizeof a);
  memcpy(&b, o, sizeof b);
  return __builtin_convertvector(a, U32) | __builtin_convertvector(b, U32) << 16;
}

// sum + low(a) low(b) + high(a) high(b), lane by lane, in fp32.
inline F32 dot_pairs(F32 sum, U32 a, U32 b) {
#if defined(__AVX512BF16__)
  return reinterpret_cast<F32>(_mm512_dpbf16_ps(reinterpret_cast<__m512>(sum), reinterpret_cast<__m512bh>(a),
                                                reinterpret_cast<__m512bh>(b)));
#else
  return (sum + low(a) * low(b)) + high(a) * high(b);
#endif
}

// ---- four bytes per lane ---------------------------------------------------------------------------------------------

inline uint32_t four_at(const void* p) {
  uint32_t four;
  memcpy(&four, p, sizeof four);
  return four;
}

inline U32 all_lanes(uint32_t four) { return four - U32{}; }

#if defined(__AVX512VNNI__)
// sum + the products of unsigned bytes of a and signed ones of b, lane by lane.
inline I32 dot_bytes(I32 sum, U32 a, U32 b) {
  return reinterpret_cast<I32>(_mm512_dpbusd_epi32(reinterpret_cast<__m512i>(sum), reinterpret_cast<__m512i>(a),
                                                   reinterpret_cast<__m512i>(b)));
}
#endif

inline F32 select(I32 mask, F32 yes, F32 no) { return mask ? yes : no; }

inline F32 max(F32 a, F32 b) { return a > b ? a : b; }  // one instruction, which `select` is not

// Numbers of lanes, 0, 1, ..., as a pack.
template <int... I>
struct Lanes {};
template <int N, int... I>
struct MakeLanes : MakeLanes<N - 1, N - 1, I...> {};
template <int... I>
struct MakeLanes<0, I...> {
  typedef Lanes<I...> type;
};

// Pairwise, so that every level sums in a fixed order of its own: the upper half of the lanes comes down on the lower
// one, again and again, in registers.
template <int Half, int... I>
inline F32 upper_half(F32 v, Lanes<I...>) {
  return __builtin_shufflevector(v, v, (I < Half ? I + Half : I)...);
}
template <int Half = kLanes / 2>
inline float sum(F32 v) {
  v += upper_half<Half>(v, typename MakeLanes<kLanes>::type{});
  if constexpr (Half > 1)
    return sum<Half / 2>(v);
  else
    return v[0];
}

// Vectors side by side. `mix` interleaves blocks of `Step` lanes: the even (Odd = 0) or odd (Odd = 1) blocks of `a` and
// `b` in turn. Repeating it for Step = 1, 2, 4, ... transposes a square of vectors.
template <int Step, int Odd, int... I>
inline F32 mix(F32 a, F32 b, Lanes<I...>) {
  return __builtin_shufflevector(a, b, ((I / Step % 2 ? I - Step + kLanes : I) + Odd * Step)...);
}
template <int Step, int Odd>
inline F32 mix(F32 a, F32 b) {
  return mix<Step, Odd>(a, b, typename MakeLanes<kLanes>::type{});
}

template <int Step = 1>
inline void transpose(F32* v) {
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) {
    if (i & Step) continue;
    const F32 a = v[i], b = v[i + Step];
    v[i] = mix<Step, 0>(a, b);
    v[i + Step] = mix<Step, 1>(a, b);
  }
  if constexpr (2 * Step < kLanes) transpose<2 * Step>(v);
}

// Halves of `a` and `b` such that adding them halves the lanes that are to be summed: shuffles of one instruction with
// an immediate, unlike `mix`, whose index vectors take registers from the sums.
#if defined(__AVX512F__)
template <int Step>
inline F32 fold(F32 a, F32 b) {
  if constexpr (Step == 1)
    return _mm512_unpacklo_ps(a, b) + _mm512_unpackhi_ps(a, b);
  else if constexpr (Step == 2)
    return mix<2, 0>(a, b) + mix<2, 1>(a, b);
  else
    return _mm512_shuffle_f32x4(a, b, 0x88) + _mm512_shuffle_f32x4(a, b, 0xdd);
}
#else
template <int Step>
inline F32 fold(F32 a, F32 b) {
  return mix<Step, 0>(a, b) + mix<Step, 1>(a, b);
}
#endif

// Lane i of the result is the sum of v[i]; `v` is overwritten.
template <int Step = 1>
inline F32 sum_each(F32* v) {
#pragma GCC unroll 16
  for (int i = 0; i < kLanes / Step; i += 2) v[i / 2] = fold<Step>(v[i], v[i + 1]);
  if constexpr (2 * Step < kLanes)
    return sum_each<2 * Step>(v);
  else
    return v[0];
}

// To nearest, ties to even, for |x| < 2^22. The product of a caller must not be joined to this: it would be rounded only
// once.
inline I32 round_lanes(F32 x) {
#if defined(__AVX512F__) && !defined(M3_EMULATE_AVX512)
  return reinterpret_cast<I32>(_mm512_cvtps_epi32(reinterpret_cast<__m512>(x)));
#else
  M3_OPAQUE(x);
  F32 shifted = x + 12582912.f;  // 1.5 * 2^23: the sum rounds to an integer
  M3_OPAQUE(shifted);
  return __builtin_convertvector(shifted - 12582912.f, I32);
#endif
}

// exp for x <= 88: relative error < 2e-7; 0 below -87.3 (so exp(-inf) = 0). Range reduction by ln 2 in two parts, then
// a degree-6 Taylor polynomial on [-ln2/2, ln2/2].
inline F32 exp(F32 x) {
  const I32 vanish = x < splat(-87.3f);
  x = select(vanish, splat(0.f), x);
  const F32 shifted = x * 1.44269504f + 12582912.f;  // 1.5 * 2^23: the sum rounds to an integer in the low mantissa
  const F32 n = shifted - 12582912.f;
  const F32 r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  F32 p = splat(1.f / 720.f);
  p = p * r + 1.f / 120.f;
  p = p * r + 1.f / 24.f;
  p = p * r + 1.f / 6.f;
  p = p * r + 0.5f;
  p = p * r + 1.f;
  p = p * r + 1.f;
  const I32 scale = (__builtin_convertvector(n, I32) + 127) << 23;
  return select(vanish, splat(0.f), p * reinterpret_cast<F32>(scale));
}

// Runs `body(tag)` with a value of the element type named by `dtype`.
template <class Body>
inline void with_dtype(m3_dtype dtype, const Body& body) {
  if (dtype == M3_BF16)
    body(BF16{});
  else if (dtype == M3_F16)
    body(F16{});
  else
    body(0.f);
}

}  // namespace
}  // namespace M3_LEVEL
}  // namespace m3
