// The AVX-512 levels on a CPU with AVX2 alone: put in front of every `*.simd.cpp` (-include) in place of -mavx512...,
// it gives the few intrinsics that the sources name by plain loops and claims the macros that choose the code; GCC's
// vector extensions split 64-byte vectors by themselves. For tests: results as on such a CPU, nothing of its speed.
// Semantics: Intel 64 and IA-32 Architectures Software Developer's Manual, volume 2.
#pragma once

#include <immintrin.h>
#include <stdint.h>
#include <string.h>

#define __AVX512F__ 1
#define __AVX512BW__ 1
#define __AVX512VL__ 1
#define __AVX512DQ__ 1
#if defined(M3_EMULATE_BF16)
#define __AVX512BF16__ 1
#define __AVX512VNNI__ 1
#endif

namespace {
namespace emulated {

typedef float F __attribute__((vector_size(64)));
typedef int32_t I __attribute__((vector_size(64)));
typedef uint16_t H __attribute__((vector_size(64)));
typedef int8_t B __attribute__((vector_size(64)));

template <class To, class From>
inline To bits(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}

inline __m512 max_ps(__m512 a, __m512 b) {
  F x = bits<F>(a), y = bits<F>(b), out;
  for (int i = 0; i < 16; ++i) out[i] = x[i] > y[i] ? x[i] : y[i];  // the second one where either is a NaN
  return bits<__m512>(out);
}

template <int kAt>  // 0: the lower two of each four, 2: the upper two
inline __m512 unpack_ps(__m512 a, __m512 b) {
  F x = bits<F>(a), y = bits<F>(b), out;
  for (int i = 0; i < 16; ++i) out[i] = (i % 2 ? y : x)[i / 4 * 4 + kAt + i % 4 / 2];
  return bits<__m512>(out);
}

inline __m512 shuffle_f32x4(__m512 a, __m512 b, int which) {
  F x = bits<F>(a), y = bits<F>(b), out;
  for (int i = 0; i < 16; ++i) out[i] = (i < 8 ? x : y)[(which >> i / 4 * 2 & 3) * 4 + i % 4];
  return bits<__m512>(out);
}

inline __m512 permutexvar_ps(__m512i at, __m512 a) {
  I index = bits<I>(at);
  F x = bits<F>(a), out;
  for (int i = 0; i < 16; ++i) out[i] = x[index[i] & 15];
  return bits<__m512>(out);
}

inline __m512i permutexvar_epi16(__m512i at, __m512i a) {
  H index = bits<H>(at), x = bits<H>(a), out;
  for (int i = 0; i < 32; ++i) out[i] = x[index[i] & 31];
  return bits<__m512i>(out);
}

inline __m512i shuffle_epi8(__m512i a, __m512i at) {
  B x = bits<B>(a), index = bits<B>(at), out;
  for (int i = 0; i < 64; ++i) out[i] = index[i] < 0 ? 0 : x[i / 16 * 16 + (index[i] & 15)];
  return bits<__m512i>(out);
}

inline __m512i srli_epi16(__m512i a, unsigned by) { return bits<__m512i>(by > 15 ? H{} : bits<H>(a) >> by); }

inline __m512i broadcast_i32x4(__m128i a) {
  __m512i out;
  for (int i = 0; i < 4; ++i) memcpy(reinterpret_cast<char*>(&out) + 16 * i, &a, 16);
  return out;
}

inline __m512i inserti32x4(__m512i a, __m128i b, int at) {
  memcpy(reinterpret_cast<char*>(&a) + 16 * at, &b, 16);
  return a;
}

// What the sources ask for: not less than, or a NaN.
inline __mmask16 cmp_ps_mask(__m512 a, __m512 b, int which) {
  if (which != _CMP_NLT_UQ) __builtin_trap();
  F x = bits<F>(a), y = bits<F>(b);
  unsigned out = 0;
  for (int i = 0; i < 16; ++i) out |= static_cast<unsigned>(!(x[i] < y[i])) << i;
  return static_cast<__mmask16>(out);
}

inline __mmask16 test_epi32_mask(__m512i a, __m512i b) {
  I x = bits<I>(a), y = bits<I>(b);
  unsigned out = 0;
  for (int i = 0; i < 16; ++i) out |= static_cast<unsigned>((x[i] & y[i]) != 0) << i;
  return static_cast<__mmask16>(out);
}

// VREDUCEPS: what is left above the floor; 0 of infinities.
inline __m512 reduce_ps(__m512 a, int how) {
  if (how != 0x9) __builtin_trap();
  F x = bits<F>(a), out;
  for (int i = 0; i < 16; ++i) out[i] = __builtin_isinf(x[i]) ? 0.f : x[i] - __builtin_floorf(x[i]);
  return bits<__m512>(out);
}

// VSCALEFPS: a times 2^floor(b).
inline __m512 maskz_scalef_ps(__mmask16 mask, __m512 a, __m512 b) {
  F x = bits<F>(a), y = bits<F>(b), out = {};
  for (int i = 0; i < 16; ++i)
    if (mask >> i & 1) out[i] = y[i] != y[i] ? y[i] : x[i] * __builtin_exp2f(__builtin_floorf(y[i]));
  return bits<__m512>(out);
}

inline __m512i loadu_si512(const void* p) {
  __m512i out;
  memcpy(&out, p, sizeof out);
  return out;
}

inline __m512i load_si512(const void* p) {
  if (reinterpret_cast<uintptr_t>(p) % 64) __builtin_trap();
  return loadu_si512(p);
}

inline __m512i maskz_loadu_epi16(uint32_t mask, const void* p) {
  H out = {};
  for (int i = 0; i < 32; ++i)
    if (mask >> i & 1) {
      uint16_t x;
      memcpy(&x, static_cast<const char*>(p) + 2 * i, 2);
      out[i] = x;
    }
  return bits<__m512i>(out);
}

inline __m128i maskz_loadu_epi8(uint16_t mask, const void* p) {
  uint8_t out[16] = {};
  for (int i = 0; i < 16; ++i)
    if (mask >> i & 1) out[i] = static_cast<const uint8_t*>(p)[i];
  __m128i result;
  memcpy(&result, out, sizeof result);
  return result;
}

inline __m512i cvtepi8_epi32(__m128i a) {
  I out;
  int8_t x[16];
  memcpy(x, &a, 16);
  for (int i = 0; i < 16; ++i) out[i] = x[i];
  return bits<__m512i>(out);
}

inline __m512 cvtepi32_ps(__m512i a) { return bits<__m512>(__builtin_convertvector(bits<I>(a), F)); }

inline __m512 cvtph_ps(__m256i a) {
  __m512 out;
  for (int i = 0; i < 2; ++i) {
    __m128i half;
    memcpy(&half, reinterpret_cast<const char*>(&a) + 16 * i, 16);
    const __m256 wide = _mm256_cvtph_ps(half);
    memcpy(reinterpret_cast<char*>(&out) + 32 * i, &wide, 32);
  }
  return out;
}

inline __m256i cvtps_ph(__m512 a) {
  __m256i out;
  for (int i = 0; i < 2; ++i) {
    __m256 half;
    memcpy(&half, reinterpret_cast<const char*>(&a) + 32 * i, 32);
    const __m128i narrow = _mm256_cvtps_ph(half, 0);
    memcpy(reinterpret_cast<char*>(&out) + 16 * i, &narrow, 16);
  }
  return out;
}

// VCVTNEPS2BF16: to nearest even, denormals count as zeros, NaNs become quiet.
inline uint16_t to_bf16(float x) {
  uint32_t u;
  memcpy(&u, &x, 4);
  if ((u & 0x7f800000u) == 0) return u >> 16 & 0x8000u;
  if (x != x) return static_cast<uint16_t>(u >> 16 | 0x40u);
  return static_cast<uint16_t>((u + 0x7fffu + (u >> 16 & 1u)) >> 16);
}

inline __m256bh cvtneps_pbh(__m512 a) {
  F x = bits<F>(a);
  uint16_t out[16];
  for (int i = 0; i < 16; ++i) out[i] = to_bf16(x[i]);
  __m256bh result;
  memcpy(&result, out, sizeof result);
  return result;
}

inline __m512bh cvtne2ps_pbh(__m512 upper, __m512 lower) {
  F x = bits<F>(lower), y = bits<F>(upper);
  uint16_t out[32];
  for (int i = 0; i < 16; ++i) out[i] = to_bf16(x[i]), out[16 + i] = to_bf16(y[i]);
  __m512bh result;
  memcpy(&result, out, sizeof result);
  return result;
}

// VDPBF16PS: the odd products first; denormals, of operands and of sums, count as zeros.
inline float flushed(float x) { return __builtin_fabsf(x) < 0x1p-126f ? 0.f : x; }
inline float from_bf16(uint16_t h) {
  const uint32_t u = static_cast<uint32_t>(h) << 16;
  float f;
  memcpy(&f, &u, 4);
  return flushed(f);
}

inline __m512 dpbf16_ps(__m512 sum, __m512bh a, __m512bh b) {
  F out = bits<F>(sum);
  uint16_t x[32], y[32];
  memcpy(x, &a, sizeof x);
  memcpy(y, &b, sizeof y);
  for (int i = 0; i < 16; ++i) {
    const float odd = flushed(__builtin_fmaf(from_bf16(x[2 * i + 1]), from_bf16(y[2 * i + 1]), flushed(out[i])));
    out[i] = flushed(__builtin_fmaf(from_bf16(x[2 * i]), from_bf16(y[2 * i]), odd));
  }
  return bits<__m512>(out);
}

// VPMADDWD: products of signed 16-bit pairs, added.
inline __m512i madd_epi16(__m512i a, __m512i b) {
  int16_t x[32], y[32];
  memcpy(x, &a, sizeof x);
  memcpy(y, &b, sizeof y);
  I out;
  for (int i = 0; i < 16; ++i) out[i] = x[2 * i] * y[2 * i] + x[2 * i + 1] * y[2 * i + 1];
  return bits<__m512i>(out);
}

// VPDPBUSD: unsigned bytes of a, signed ones of b.
inline __m512i dpbusd_epi32(__m512i sum, __m512i a, __m512i b) {
  uint8_t x[64];
  int8_t y[64];
  memcpy(x, &a, sizeof x);
  memcpy(y, &b, sizeof y);
  I out = bits<I>(sum);
  for (int i = 0; i < 64; ++i) out[i / 4] += x[i] * y[i];
  return bits<__m512i>(out);
}

}  // namespace emulated
}  // namespace

#undef _mm512_shuffle_f32x4
#undef _mm512_srli_epi16
#undef _mm512_cvtps_ph
#undef _mm512_cmp_ps_mask
#undef _mm512_inserti32x4
#undef _mm512_reduce_ps
#define _mm512_max_ps emulated::max_ps
#define _mm512_unpacklo_ps emulated::unpack_ps<0>
#define _mm512_unpackhi_ps emulated::unpack_ps<2>
#define _mm512_shuffle_f32x4 emulated::shuffle_f32x4
#define _mm512_permutexvar_ps emulated::permutexvar_ps
#define _mm512_permutexvar_epi16 emulated::permutexvar_epi16
#define _mm512_shuffle_epi8 emulated::shuffle_epi8
#define _mm512_srli_epi16 emulated::srli_epi16
#define _mm512_broadcast_i32x4 emulated::broadcast_i32x4
#define _mm512_inserti32x4 emulated::inserti32x4
#define _mm512_cmp_ps_mask emulated::cmp_ps_mask
#define _mm512_test_epi32_mask emulated::test_epi32_mask
#define _mm512_reduce_ps emulated::reduce_ps
#define _mm512_maskz_scalef_ps emulated::maskz_scalef_ps
#define _mm512_scalef_ps(a, b) emulated::maskz_scalef_ps(0xffff, a, b)
#define _mm512_loadu_si512 emulated::loadu_si512
#define _mm512_load_si512 emulated::load_si512
#define _mm512_maskz_loadu_epi16 emulated::maskz_loadu_epi16
#define _mm_maskz_loadu_epi8 emulated::maskz_loadu_epi8
#define _mm512_cvtepi8_epi32 emulated::cvtepi8_epi32
#define _mm512_cvtepi32_ps emulated::cvtepi32_ps
#define _mm512_cvtph_ps emulated::cvtph_ps
#define _mm512_cvtps_ph(a, rounding) emulated::cvtps_ph(a)
#define _mm512_cvtneps_pbh emulated::cvtneps_pbh
#define _mm512_cvtne2ps_pbh emulated::cvtne2ps_pbh
#define _mm512_dpbf16_ps emulated::dpbf16_ps
#define _mm512_madd_epi16 emulated::madd_epi16
#define _mm512_dpbusd_epi32 emulated::dpbusd_epi32
