// Products of four bytes per lane, for `*.simd.cpp` files: unsigned activations, the same four in all lanes, times signed
// weights, sums in int32. One instruction with VNNI; elsewhere bytes become 16-bit integers, even and odd ones apart.
#pragma once

#include "common/vec.h"

namespace m3 {
namespace M3_LEVEL {
namespace {

#if defined(__AVX512VNNI__)

constexpr int kRowsAtOnce = 6, kTilesAtOnce = 4;

struct Weights {
  U32 bytes;
  explicit Weights(const void* p) { memcpy(&bytes, p, sizeof bytes); M3_OPAQUE(bytes); }
};
struct Values {
  U32 bytes;
  explicit Values(const void* p) : bytes(all_lanes(four_at(p))) {}
};
inline void add_products(I32& sum, const Weights& w, const Values& x) {
  sum = dot_bytes(sum, x.bytes, w.bytes);
}

#else

#if defined(__AVX512F__)
constexpr int kRowsAtOnce = 4, kTilesAtOnce = 4;
inline I32 pair_products(U32 a, U32 b) {
  return reinterpret_cast<I32>(_mm512_madd_epi16(reinterpret_cast<__m512i>(a), reinterpret_cast<__m512i>(b)));
}
#elif defined(__AVX2__)
constexpr int kRowsAtOnce = 4, kTilesAtOnce = 1;
inline I32 pair_products(U32 a, U32 b) {
  return reinterpret_cast<I32>(_mm256_madd_epi16(reinterpret_cast<__m256i>(a), reinterpret_cast<__m256i>(b)));
}
#else
constexpr int kRowsAtOnce = 2, kTilesAtOnce = 1;
inline I32 pair_products(U32 a, U32 b) {  // 16-bit integers
  const I32 x = reinterpret_cast<I32>(a), y = reinterpret_cast<I32>(b);
  return (x << 16 >> 16) * (y << 16 >> 16) + (x >> 16) * (y >> 16);
}
#endif

typedef int16_t Words __attribute__((vector_size(4 * kLanes)));

struct Weights {
  U32 even, odd;
  explicit Weights(const void* p) {
    Words both;
    memcpy(&both, p, sizeof both);
    even = reinterpret_cast<U32>(both << 8 >> 8), odd = reinterpret_cast<U32>(both >> 8);
    M3_OPAQUE(even);
    M3_OPAQUE(odd);
  }
};
struct Values {
  U32 even, odd;
  explicit Values(const void* p) {
    const uint32_t four = four_at(p);
    even = all_lanes(four & 0x00ff00ffu), odd = all_lanes(four >> 8 & 0x00ff00ffu);
  }
};
inline void add_products(I32& sum, const Weights& w, const Values& x) {
  sum += pair_products(x.even, w.even) + pair_products(x.odd, w.odd);
}

#endif

}  // namespace
}  // namespace M3_LEVEL
}  // namespace m3
