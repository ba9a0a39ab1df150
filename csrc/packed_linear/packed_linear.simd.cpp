// Lanes run over the 16 rows of a tile, so a block's scales are one vector, and an activation pair is broadcast to all of
// them. Few rows of x read the packed blocks directly: weights stream through once, expanded in registers. Many rows
// expand two tiles into a panel of bf16 pairs first (small integers are exact in bf16) and multiply it again and again.
#include "m3/packed_linear.h"

#include "common/vec.h"

namespace m3 {
namespace M3_LEVEL {
namespace {

constexpr int kParts = M3_PACKED_ROWS / kLanes;  // vectors that hold one value of each row of a tile
constexpr int kPairs = M3_PACKED_COLS / 2;
constexpr int kDirect = 16;                      // up to so many rows of x, weights are expanded in registers
constexpr int kGroup = kLanes == 16 ? 8 : 2;     // rows of x that share an expanded weight there
constexpr int kDirectTiles = kLanes == 16 ? 2 : 1;
constexpr int kPanelTiles = kLanes == 16 ? 4 : 1;
constexpr int kStep = kLanes == 16 ? 4 : 2;      // rows of x that are multiplied by a panel at once
constexpr int kPanelCols = 256;                  // columns of a panel at most: four tiles of them are 32 KiB
constexpr int64_t kPanelRows = 256;              // rows of x per panel at most: their sums are 64 KiB

typedef int8_t I8x2 __attribute__((vector_size(2 * kLanes)));
typedef float F32x2 __attribute__((vector_size(8 * kLanes)));
typedef uint32_t U32x2 __attribute__((vector_size(8 * kLanes)));
typedef uint16_t U16x2 __attribute__((vector_size(4 * kLanes)));

inline U32 broadcast(uint32_t pair) { return pair - U32{}; }

// The value stays in a register: the compiler would rather load it again for every product.
inline void keep(U32& pair) {
#if defined(__AVX512F__)
  asm("" : "+v"(pair));
#else
  (void)pair;
#endif
}

// Small integers as bf16: their float's lower half is zero.
inline U32 to_pairs(F32x2 f) {
  return reinterpret_cast<U32>(__builtin_convertvector(reinterpret_cast<U32x2>(f) >> 16, U16x2));
}

// ---- formats: expand(block, pair, part) gives the weights of a column pair, kLanes rows, as bf16 pairs ----------------

struct Bf16Weight {
  static constexpr m3_weight_format kFormat = M3_WEIGHT_BF16;
  static constexpr bool kScaled = false, kShifted = false;
  static inline U32 expand(const uint8_t* block, int pair, int part) {
    return load_pairs(block + (pair * kParts + part) * sizeof(U32));
  }
};

struct Q8Weight {
  static constexpr m3_weight_format kFormat = M3_WEIGHT_Q8_0;
  static constexpr bool kScaled = true, kShifted = false;
  static inline U32 expand(const uint8_t* block, int pair, int part) {
    const uint8_t* at = block + (pair * kParts + part) * sizeof(I8x2);
#if defined(__AVX512BF16__)
    const __m512 low = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(at))));
    const __m512 high =
        _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(at + 16))));
    return reinterpret_cast<U32>(_mm512_cvtne2ps_pbh(high, low));
#else
    I8x2 q;
    memcpy(&q, at, sizeof q);
    return to_pairs(__builtin_convertvector(q, F32x2));
#endif
  }
};

struct Q4Weight {
  static constexpr m3_weight_format kFormat = M3_WEIGHT_Q4_1;
  static constexpr bool kScaled = true, kShifted = true;
  static inline U32 expand(const uint8_t* block, int pair, int part) {
    const U32 words = load_pairs(block + (pair / 4 * kParts + part) * sizeof(U32));
#if defined(__AVX512BW__)
    // bf16 of 0..15, twice: the lookup reads five bits, of which the highest belongs to the next column.
    alignas(64) static constexpr uint16_t kBf16[32] = {
        0,      0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0, 0x4100, 0x4110, 0x4120,
        0x4130, 0x4140, 0x4150, 0x4160, 0x4170, 0,      0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0,
        0x40c0, 0x40e0, 0x4100, 0x4110, 0x4120, 0x4130, 0x4140, 0x4150, 0x4160, 0x4170};
    const __m512i index = _mm512_srli_epi16(reinterpret_cast<__m512i>(words), static_cast<unsigned>(pair % 4 * 4));
    return reinterpret_cast<U32>(_mm512_permutexvar_epi16(index, _mm512_load_si512(kBf16)));
#else
    const U16x2 q = reinterpret_cast<U16x2>(words) >> static_cast<uint16_t>(pair % 4 * 4) & 15;
    return to_pairs(__builtin_convertvector(q, F32x2));
#endif
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
  const F16* scale(int64_t b) const { return scales + b * (m3_packed_scale_bytes(W::kFormat) / 2); }
};

inline uint32_t pair_at(const uint16_t* x) {
  uint32_t pair;
  memcpy(&pair, x, sizeof pair);
  return pair;
}

// Sums [kLanes * kParts] of one row and tile -> out, as far as the weight has rows.
inline void write(const M3PackedLinearParams& p, int64_t row, int64_t tile, const F32* sums) {
  const int64_t first = tile * M3_PACKED_ROWS, at = row * p.out_stride + first, n = p.weight.rows - first;
  with_dtype(p.out_dtype, [&](auto tag) {
    using Out = decltype(tag);
    Out* out = static_cast<Out*>(p.out) + at;
    Out whole[M3_PACKED_ROWS];
    Out* to = n >= M3_PACKED_ROWS ? out : whole;
    for (int v = 0; v < kParts; ++v) store(to + v * kLanes, sums[v]);
    if (to == whole) memcpy(out, whole, sizeof(Out) * n);
  });
}

// ---- few rows --------------------------------------------------------------------------------------------------------

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

// sum += d part + shift sums, for a block: part [Rows][Side] are products with unscaled weights, sum, d and shift vectors
// in memory, sums [Rows, pitch] those of x.
template <class W, int Rows, int Side>
inline __attribute__((always_inline)) void add_block(const F32 (&part)[Rows][Side], const F32 (&d)[Side],
                                                     const F32 (&shift)[Side], const float* sums, int64_t pitch,
                                                     float* sum) {
#pragma GCC unroll 8
  for (int m = 0; m < Rows; ++m)
#pragma GCC unroll 4
    for (int v = 0; v < Side; ++v) {
      float* to = sum + (m * Side + v) * kLanes;
      F32 whole = load(to);
      if constexpr (W::kScaled)
        whole += d[v] * part[m][v];
      else
        whole += part[m][v];
      if constexpr (W::kShifted) whole += shift[v] * sums[m * pitch];
      store(to, whole);
    }
}

// Tiles tiles, Rows rows of x from `row` on.
template <class W, int Rows, int Tiles>
void direct(const M3PackedLinearParams& p, int64_t tile, int64_t row, Prefetch& prefetch) {
  constexpr int kSide = Tiles * kParts;
  // An addition takes longer than a product's turn: few sums are cut into chains.
  constexpr int kChains = Rows * Tiles <= 2 ? 4 : Rows * Tiles <= 8 ? 2 : 1;
  const int64_t blocks = p.weight.cols / M3_PACKED_COLS;
  const Tile<W> first(p.weight, tile), last(p.weight, tile + Tiles - 1);
  alignas(64) float sum[Rows * kSide * kLanes] = {};
  for (int64_t b = 0; b < blocks; ++b) {
    const uint8_t* block[2] = {first.block(b), last.block(b)};
    const F16* scales[2] = {first.scale(b), last.scale(b)};
    if (row == 0)
      for (int t = 0; t < Tiles; ++t) prefetch.block();
    const uint16_t* x = p.x + row * p.x_stride + b * M3_PACKED_COLS;
    F32 part[kChains][Rows][kSide] = {};
#pragma GCC unroll 16
    for (int k = 0; k < kPairs; ++k) {
      F32(&to)[Rows][kSide] = part[k % kChains];
#pragma GCC unroll 8
      for (int v = 0; v < kSide; ++v) {
        const U32 w = W::expand(block[v / kParts], k, v % kParts);
#pragma GCC unroll 8
        for (int m = 0; m < Rows; ++m) to[m][v] = dot_pairs(to[m][v], w, broadcast(pair_at(x + m * p.x_stride + 2 * k)));
      }
    }
#pragma GCC unroll 4
    for (int c = 1; c < kChains; ++c)
#pragma GCC unroll 8
      for (int m = 0; m < Rows; ++m)
#pragma GCC unroll 8
        for (int v = 0; v < kSide; ++v) part[0][m][v] += part[c][m][v];
    F32 d[kSide], shift[kSide];
#pragma GCC unroll 8
    for (int v = 0; v < kSide; ++v) {
      const F16* at = scales[v / kParts] + v % kParts * kLanes;
      if constexpr (W::kScaled) d[v] = load(at);
      if constexpr (W::kShifted) shift[v] = load(at + M3_PACKED_ROWS);
    }
    add_block<W, Rows, kSide>(part[0], d, shift, p.sums + row * blocks + b, blocks, sum);
  }
  for (int m = 0; m < Rows; ++m)
    for (int t = 0; t < Tiles; ++t) {
      F32 out[kParts];
      for (int v = 0; v < kParts; ++v) out[v] = load(sum + ((m * Tiles + t) * kParts + v) * kLanes);
      write(p, row + m, tile + t, out);
    }
}

template <class W, int Tiles>
void few_rows(const M3PackedLinearParams& p, int64_t tile, Prefetch& prefetch) {
  for (int64_t row = 0; row < p.count;) {
    const int64_t left = p.count - row;
    if (kGroup >= 8 && left >= 8)
      direct<W, kGroup, Tiles>(p, tile, row, prefetch), row += kGroup;
    else if (kGroup >= 4 && left >= 4)
      direct<W, kGroup / 2, Tiles>(p, tile, row, prefetch), row += kGroup / 2;
    else if (left >= 2)
      direct<W, 2, Tiles>(p, tile, row, prefetch), row += 2;
    else
      direct<W, 1, Tiles>(p, tile, row, prefetch), row += 1;
  }
}

template <class W>
void few_rows(const M3PackedLinearParams& p, int64_t begin, int64_t end) {
  // Where products take longer than reading, callers cut their tiles into small pieces: look beyond this one.
  Prefetch prefetch(p.weight, begin, p.count >= 4 ? m3_packed_tiles(&p.weight) : end);
  int64_t tile = begin;
  if (p.count >= kGroup)
    for (; tile + kDirectTiles <= end; tile += kDirectTiles) few_rows<W, kDirectTiles>(p, tile, prefetch);
  for (; tile < end; ++tile) few_rows<W, 1>(p, tile, prefetch);
}

// ---- many rows -------------------------------------------------------------------------------------------------------

template <class W, int Tiles>
struct Panel {
  static constexpr int kSide = Tiles * kParts;

  alignas(64) uint32_t pairs[kPanelCols / 2 * Tiles * M3_PACKED_ROWS];
  alignas(64) float scale[kPanelCols / M3_PACKED_COLS * Tiles * M3_PACKED_ROWS];
  alignas(64) float shift[kPanelCols / M3_PACKED_COLS * Tiles * M3_PACKED_ROWS];
  alignas(64) float sum[kPanelRows * Tiles * M3_PACKED_ROWS];
  int64_t first, blocks;  // of columns

  void expand(const M3PackedWeight& w, int64_t tile) {
    for (int t = 0; t < Tiles; ++t) {
      const Tile<W> at(w, tile + t);
      for (int64_t b = 0; b < blocks; ++b) {
        const uint8_t* block = at.block(first + b);
        for (int k = 0; k < kPairs; ++k)
          for (int v = 0; v < kParts; ++v) {
            const U32 pair = W::expand(block, k, v);
            memcpy(pairs + ((b * kPairs + k) * kSide + t * kParts + v) * kLanes, &pair, sizeof pair);
          }
        for (int v = 0; v < kParts; ++v) {
          float* to = scale + (b * kSide + t * kParts + v) * kLanes;
          if constexpr (W::kScaled) store(to, load(at.scale(first + b) + v * kLanes));
          to = shift + (b * kSide + t * kParts + v) * kLanes;
          if constexpr (W::kShifted) store(to, load(at.scale(first + b) + M3_PACKED_ROWS + v * kLanes));
        }
      }
    }
  }

  // sum += x times the panel, for Rows rows; sums [.., total] are those of x's blocks.
  template <int Rows>
  void multiply(const uint16_t* x, int64_t stride, const float* sums, int64_t total, float* to) const {
    for (int64_t b = 0; b < blocks; ++b) {
      F32 part[Rows][kSide] = {};
      const uint32_t* panel = pairs + b * kPairs * kSide * kLanes;
      const uint16_t* xb = x + (first + b) * M3_PACKED_COLS;
#pragma GCC unroll 2
      for (int k = 0; k < kPairs; ++k) {
        U32 w[kSide];
#pragma GCC unroll 4
        for (int v = 0; v < kSide; ++v) {
          U32 pair = load_pairs(panel + (k * kSide + v) * kLanes);
          keep(pair);
          w[v] = pair;
        }
#pragma GCC unroll 8
        for (int m = 0; m < Rows; ++m) {
          const U32 a = broadcast(pair_at(xb + m * stride + 2 * k));
#pragma GCC unroll 4
          for (int v = 0; v < kSide; ++v) part[m][v] = dot_pairs(part[m][v], w[v], a);
        }
      }
      F32 d[kSide], s[kSide];
#pragma GCC unroll 4
      for (int v = 0; v < kSide; ++v) {
        if constexpr (W::kScaled) d[v] = load(scale + (b * kSide + v) * kLanes);
        if constexpr (W::kShifted) s[v] = load(shift + (b * kSide + v) * kLanes);
      }
      add_block<W, Rows, kSide>(part, d, s, sums + first + b, total, to);
    }
  }

  void multiply_rows(const M3PackedLinearParams& p, int64_t row, int64_t rows) {
    const int64_t total = p.weight.cols / M3_PACKED_COLS;
    for (int64_t m = 0; m < rows;) {
      const uint16_t* x = p.x + (row + m) * p.x_stride;
      const float* sums = p.sums + (row + m) * total;
      float* to = sum + m * kSide * kLanes;
      const int64_t left = rows - m;
      if (left >= kStep)
        multiply<kStep>(x, p.x_stride, sums, total, to), m += kStep;
      else if (left >= 2)
        multiply<2>(x, p.x_stride, sums, total, to), m += 2;
      else
        multiply<1>(x, p.x_stride, sums, total, to), m += 1;
    }
  }

  // Rows [row, row + rows) of x times tiles [tile, tile + Tiles).
  void run(const M3PackedLinearParams& p, int64_t tile, int64_t row, int64_t rows) {
    const int64_t total = p.weight.cols / M3_PACKED_COLS, most = kPanelCols / M3_PACKED_COLS;
    const int64_t passes = (total + most - 1) / most, each = passes > 0 ? (total + passes - 1) / passes : 0;
    memset(sum, 0, sizeof(float) * rows * Tiles * M3_PACKED_ROWS);
    for (first = 0; first < total; first += each) {
      blocks = total - first < each ? total - first : each;
      expand(p.weight, tile);
      multiply_rows(p, row, rows);
    }
    for (int64_t m = 0; m < rows; ++m)
      for (int64_t t = 0; t < Tiles; ++t) {
        F32 out[kParts];
        for (int v = 0; v < kParts; ++v) out[v] = load(sum + ((m * Tiles + t) * kParts + v) * kLanes);
        write(p, row + m, tile + t, out);
      }
  }
};

template <class W>
void many_rows(const M3PackedLinearParams& p, int64_t begin, int64_t end) {
  union {
    Panel<W, kPanelTiles> wide;
    Panel<W, 1> narrow;
  };
  const int64_t passes = (p.count + kPanelRows - 1) / kPanelRows, each = (p.count + passes - 1) / passes;
  for (int64_t row = 0; row < p.count; row += each) {
    const int64_t rows = p.count - row < each ? p.count - row : each;
    int64_t tile = begin;
    for (; tile + kPanelTiles <= end; tile += kPanelTiles) wide.run(p, tile, row, rows);
    for (; tile < end; ++tile) narrow.run(p, tile, row, rows);
  }
}

template <class W>
void linear(const M3PackedLinearParams& p, int64_t begin, int64_t end) {
  if (p.count <= kDirect)
    few_rows<W>(p, begin, end);
  else
    many_rows<W>(p, begin, end);
}

template <class T>
void pack_rows(const T* x, int64_t stride, int64_t count, int64_t cols, uint16_t* out, float* sums) {
  for (int64_t m = 0; m < count; ++m)
    for (int64_t b = 0; b < cols / M3_PACKED_COLS; ++b) {
      BF16* to = reinterpret_cast<BF16*>(out + m * cols + b * M3_PACKED_COLS);
      F32 total = {};
      for (int i = 0; i < M3_PACKED_COLS; i += kLanes) {
        store(to + i, load(x + m * stride + b * M3_PACKED_COLS + i));
        total += load(to + i);
      }
      if (sums != nullptr) sums[m * (cols / M3_PACKED_COLS) + b] = sum(total);
    }
}

}  // namespace

void packed_linear(const M3PackedLinearParams& p, int64_t begin, int64_t end) {
  switch (p.weight.format) {
    case M3_WEIGHT_BF16: linear<Bf16Weight>(p, begin, end); break;
    case M3_WEIGHT_Q8_0: linear<Q8Weight>(p, begin, end); break;
    case M3_WEIGHT_Q4_1: linear<Q4Weight>(p, begin, end); break;
  }
}

void pack_activations(const void* x, m3_dtype dtype, int64_t stride, int64_t count, int64_t cols, uint16_t* out,
                      float* sums) {
  with_dtype(dtype, [&](auto tag) {
    pack_rows(static_cast<const decltype(tag)*>(x), stride, count, cols, out, sums);
  });
}

}  // namespace M3_LEVEL
}  // namespace m3
