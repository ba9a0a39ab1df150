// The formats of packed weights, for `*.simd.cpp` files: how a block expands. Where the level multiplies bf16 pairs,
// pairs(block, pair, part) gives the weights of a column pair, kLanes rows, as bf16 pairs. Elsewhere floats(...) gives
// them as two vectors of floats that are kUp[column] times too large: a power of two, which saves shifts and which the
// other factor makes good exactly. Where it multiplies bytes, quads(block, i, ...) gives columns 8i .. 8i + 7 of kLanes
// rows as unsigned bytes, kZero too large, four columns per lane. Scales come after any of them.
#pragma once

#include "common/pair_tile.h"
#include "m3/packed_linear.h"

// Bytes are multiplied where the level has an instruction for it and no tile registers.
#if defined(__AVX512VNNI__) && !defined(__AMX_BF16__)
#define M3_BYTE_PRODUCTS
#endif

namespace m3 {
namespace M3_LEVEL {
namespace {

constexpr int kParts = M3_PACKED_ROWS / kLanes;  // vectors that hold one value of each row of a tile
constexpr int kPairs = M3_PACKED_COLS / 2;

struct Columns {
  float at[M3_PACKED_COLS];
};

typedef int16_t I16 __attribute__((vector_size(2 * kLanes)));

struct Bf16Weight {
  static constexpr m3_weight_format kFormat = M3_WEIGHT_BF16;
  static constexpr bool kScaled = false, kShifted = false;
  static constexpr float up(int) { return 1.f; }

  static inline U32 pairs(const uint8_t* block, int pair, int part) {
    return load_pairs(block + (pair * kParts + part) * sizeof(U32));
  }
  static inline void floats(const uint8_t* block, int pair, int part, F32* even, F32* odd) {
    const U32 both = pairs(block, pair, part);
    *even = low(both), *odd = high(both);
  }
};

struct Q8Weight {
  static constexpr m3_weight_format kFormat = M3_WEIGHT_Q8_0;
  static constexpr bool kScaled = true, kShifted = false;
  static constexpr float up(int column) { return column % 2 ? 0x1p8f : 0x1p24f; }

#if defined(__AVX512BF16__)
  static inline U32 pairs(const uint8_t* block, int pair, int part) {
    const uint8_t* at = block + (pair * kParts + part) * sizeof(I16);
    const __m512 low = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(at))));
    const __m512 high =
        _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(at + 16))));
    return reinterpret_cast<U32>(_mm512_cvtne2ps_pbh(high, low));
  }
#endif
#if defined(M3_BYTE_PRODUCTS)
  static constexpr int kZero = 128;

  static inline void quads(const uint8_t* block, int eight, U32* first, U32* second) {
    alignas(64) static constexpr uint16_t kZip[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                      8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    const __m512i zip = _mm512_load_si512(kZip);
    const auto quad = [&](int i) {  // two pairs of columns lie one behind the other
      const U32 pairs = load_pairs(block + i * sizeof(U32));
      return reinterpret_cast<U32>(_mm512_permutexvar_epi16(zip, reinterpret_cast<__m512i>(pairs))) ^ 0x80808080u;
    };
    *first = quad(2 * eight), *second = quad(2 * eight + 1);
  }
#endif
  static inline void floats(const uint8_t* block, int pair, int part, F32* even, F32* odd) {
    I16 q;
    memcpy(&q, block + (pair * kParts + part) * sizeof q, sizeof q);
    const I32 both = __builtin_convertvector(q, I32);
    *even = __builtin_convertvector(both << 24, F32), *odd = __builtin_convertvector(both & ~255, F32);
  }
};

struct Q4Weight {
  static constexpr m3_weight_format kFormat = M3_WEIGHT_Q4_1;
  static constexpr bool kScaled = true, kShifted = true;
  // The four highest bits are shifted down, since they would give a negative integer.
  static constexpr float up(int column) {
    const int bit = column / 2 % 4 * 4 + column % 2 * 16;
    return bit == 28 ? 1.f : static_cast<float>(1 << bit);
  }

  static inline U32 words(const uint8_t* block, int pair, int part) {
    return load_pairs(block + (pair / 4 * kParts + part) * sizeof(U32));
  }
#if defined(__AVX512BF16__)
  static inline U32 pairs(const uint8_t* block, int pair, int part) {
    // bf16 of 0..15, twice: the lookup reads five bits, of which the highest belongs to the next column.
    alignas(64) static constexpr uint16_t kBf16[32] = {
        0,      0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0, 0x4100, 0x4110, 0x4120,
        0x4130, 0x4140, 0x4150, 0x4160, 0x4170, 0,      0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0,
        0x40c0, 0x40e0, 0x4100, 0x4110, 0x4120, 0x4130, 0x4140, 0x4150, 0x4160, 0x4170};
    const __m512i index = _mm512_srli_epi16(reinterpret_cast<__m512i>(words(block, pair, part)),
                                            static_cast<unsigned>(pair % 4 * 4));
    return reinterpret_cast<U32>(_mm512_permutexvar_epi16(index, _mm512_load_si512(kBf16)));
  }
#endif
#if defined(M3_BYTE_PRODUCTS)
  static constexpr int kZero = 0;

  // Columns 0, 4, 1, 5 and 2, 6, 3, 7 of eight: as the nibbles lie.
  static inline void quads(const uint8_t* block, int eight, U32* first, U32* second) {
    const U32 both = words(block, 4 * eight, 0);
    *first = both & 0x0f0f0f0fu, *second = both >> 4 & 0x0f0f0f0fu;
  }
#endif
  static inline void floats(const uint8_t* block, int pair, int part, F32* even, F32* odd) {
    const U32 both = words(block, pair, part);
    const int bit = pair % 4 * 4;
    const U32 e = both & (15u << bit), o = bit == 12 ? both >> 28 : both & (15u << (16 + bit));
    *even = __builtin_convertvector(reinterpret_cast<I32>(e), F32);
    *odd = __builtin_convertvector(reinterpret_cast<I32>(o), F32);
  }
};

// One tile's blocks and scales.
template <class W>
struct Tile {
  const uint8_t* blocks;
  const F16* scales;

  Tile(const M3PackedWeight& w, int64_t tile)
      : blocks(w.data + tile * m3_packed_tile_bytes(&w)),
        scales(reinterpret_cast<const F16*>(blocks + w.cols / M3_PACKED_COLS * m3_packed_block_bytes(W::kFormat))) {}

  const uint8_t* block(int64_t b) const { return blocks + b * m3_packed_block_bytes(W::kFormat); }

  // d and m of block b; what the format does not have is left alone.
  void load_scales(int64_t b, int part, F32* d, F32* m) const {
    const F16* at = scales + b * (m3_packed_scale_bytes(W::kFormat) / 2) + part * kLanes;
    if constexpr (W::kScaled) *d = load(at);
    if constexpr (W::kShifted) *m = load(at + M3_PACKED_ROWS);
  }
};

// Brings weights into L2 some blocks ahead of their use, up to `end`. Expanding puts so many instructions between two
// loads that the out-of-order window spans less than 2 KiB of weights, and a core's few L1 misses in flight cannot fill
// memory's latency: measured 8-10 GB/s without, 15-18 with (EPYC 9004, one thread; plain reads 20-25). Into L1, or
// nearer than 8 KiB, it gained little.
struct Prefetch {
  const int64_t step;
  const uint8_t *at, *stop, *end;

  Prefetch(const M3PackedWeight& w, int64_t tile, int64_t last)
      : step(m3_packed_block_bytes(w.format) + m3_packed_scale_bytes(w.format)),
        at(w.data + tile * m3_packed_tile_bytes(&w) + 32 * m3_packed_block_bytes(w.format)),
        stop(at),
        end(w.data + last * m3_packed_tile_bytes(&w)) {}

  void block() {
    stop += step;
    for (; at < stop && at < end; at += 64) __builtin_prefetch(at, 0, 2);
  }
};

// The same, and something else, spread over the blocks of a call: many lines at once would have to wait for one another,
// and products for them. A type of its own, since what it needs costs the other registers and a tenth of its speed.
struct PrefetchBoth : Prefetch {
  const M3Lines *now, *last;
  int64_t next = 0, each;

  PrefetchBoth(const Prefetch& weights, const M3PackedLinearParams& p, int64_t blocks)
      : Prefetch(weights), now(p.ahead), last(p.ahead + p.stretches) {
    int64_t lines = 0;
    for (int64_t i = 0; i < p.stretches; ++i) lines += p.ahead[i].count;
    each = blocks > 0 ? (lines + blocks - 1) / blocks : 0;
  }

  void block() {
    Prefetch::block();
    for (int64_t n = each; n > 0 && now < last;) {
      if (next < now->count)
        __builtin_prefetch(now->at + 64 * next++, 0, 2), --n;
      else
        ++now, next = 0;
    }
  }
};

}  // namespace
}  // namespace M3_LEVEL
}  // namespace m3
