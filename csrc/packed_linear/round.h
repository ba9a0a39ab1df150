// How activations are rounded for a linear map, a block of 32 columns at a time, for `*.simd.cpp` files.
#pragma once

#include "packed_linear/by_bytes.h"

namespace m3 {
namespace M3_LEVEL {
namespace {

constexpr int kBlockParts = M3_PACKED_COLS / kLanes;  // vectors of a block

inline I32 larger(I32 a, I32 b) { return a > b ? a : b; }
inline I32 smaller(I32 a, I32 b) { return a > b ? b : a; }

template <int Half = kLanes / 2>
inline int32_t largest(I32 v) {
  v = larger(v, reinterpret_cast<I32>(upper_half<Half>(reinterpret_cast<F32>(v), typename MakeLanes<kLanes>::type{})));
  if constexpr (Half > 1)
    return largest<Half / 2>(v);
  else
    return v[0];
}

inline float float_of(int32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

// q = v over a power of two, to nearest, at most 127; returns that power, NaN where v is not finite or 2^112 or more.
inline float round_to_bytes(F32 (&v)[kBlockParts], I32 (&q)[kBlockParts]) {
  I32 top = {};
  for (int i = 0; i < kBlockParts; ++i) top = larger(top, reinterpret_cast<I32>(v[i]) & 0x7fffffff);
  // As a float's exponent: that power times any scale of a weight is a normal number.
  constexpr int kLeast = 127 - 54, kMost = 127 + 112;
  const int exponent = largest(top) >> 23, used = exponent < kLeast ? kLeast : exponent;
  const float inverse = float_of((260 - used) << 23);
  for (int i = 0; i < kBlockParts; ++i) {
    q[i] = round_lanes(v[i] * inverse);
    q[i] = smaller(larger(q[i], I32{} - 127), I32{} + 127);
  }
  return exponent >= kMost ? __builtin_nanf("") : float_of((used - 6) << 23);
}

// A block of a row.
inline void store_block(const M3PackedRows& to, int64_t row, int64_t block, F32 (&v)[kBlockParts]) {
  const int64_t at = row * to.cols + block * M3_PACKED_COLS, index = row * (to.cols / M3_PACKED_COLS) + block;
  BF16* const x = reinterpret_cast<BF16*>(to.x + at);
  if (to.activations == M3_ACTIVATIONS_BF16) {
    F32 total = {};
    for (int i = 0; i < kBlockParts; ++i) {
      store(x + i * kLanes, v[i]);
      total += load(x + i * kLanes);
    }
    if (to.sums != nullptr) to.sums[index] = sum(total);
    return;
  }
  I32 q[kBlockParts];
  const float scale = round_to_bytes(v, q);
  F32 total = {};
  for (int i = 0; i < kBlockParts; ++i) {
    const F32 whole = __builtin_convertvector(q[i], F32);
    total += whole;
#if !defined(M3_BYTE_PRODUCTS)
    store(x + i * kLanes, whole * scale);
#endif
  }
#if defined(M3_BYTE_PRODUCTS)
  ByBytes::store_bytes(to.format, q, reinterpret_cast<int8_t*>(to.x) + at);
#endif
  to.sums[index] = sum(total) * scale, to.scales[index] = scale;
}

}  // namespace
}  // namespace M3_LEVEL
}  // namespace m3
