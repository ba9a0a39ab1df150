// Products of bf16 pairs (levels that have an instruction for them): an activation pair is broadcast to all lanes of an
// expanded weight. Quantised integers are exact in bf16; their scales are applied to the sums of a block.
#pragma once

#include "packed_linear/formats.h"

namespace m3 {
namespace M3_LEVEL {
namespace {

struct ByPairs {
  static constexpr int kDirect = 16;     // up to so many rows of x, weights are expanded in registers
  static constexpr int kGroup = 8;       // rows of x that share an expanded weight there
  static constexpr int kDirectTiles = 2;

  static inline U32 broadcast(uint32_t pair) { return pair - U32{}; }

  static inline uint32_t pair_at(const uint16_t* x) {
    uint32_t pair;
    memcpy(&pair, x, sizeof pair);
    return pair;
  }

  // The value stays in a register: the compiler would rather load it again for every product.
  static inline void keep(U32& pair) {
#if defined(__AVX512F__)
    M3_OPAQUE(pair);
#else
    (void)pair;
#endif
  }

  // sum += d part + shift sums, for a block: part [Rows][Side] are products with unscaled weights, sum, d and shift
  // vectors in memory, sums [Rows, pitch] those of x.
  template <class W, int Rows, int Side>
  static inline __attribute__((always_inline)) void add_block(const F32 (&part)[Rows][Side], const F32 (&d)[Side],
                                                              const F32 (&shift)[Side], const float* sums,
                                                              int64_t pitch, float* sum, int64_t sum_pitch) {
#pragma GCC unroll 8
    for (int m = 0; m < Rows; ++m)
#pragma GCC unroll 4
      for (int v = 0; v < Side; ++v) {
        float* to = sum + m * sum_pitch + v * kLanes;
        F32 whole = load(to);
        if constexpr (W::kScaled)
          whole += d[v] * part[m][v];
        else
          whole += part[m][v];
        if constexpr (W::kShifted) whole += shift[v] * sums[m * pitch];
        store(to, whole);
      }
  }

  // sum [Rows, pitch] = rows of x from `row` on times Tiles tiles.
  template <class W, int Rows, int Tiles, class Fetch>
  static void direct(const M3PackedLinearParams& p, int64_t tile, int64_t row, Fetch& prefetch, float* sum,
                     int64_t pitch) {
    constexpr int kSide = Tiles * kParts;
    // An addition takes longer than a product's turn: few sums are cut into chains.
    constexpr int kChains = Rows * Tiles <= 2 ? 4 : Rows * Tiles <= 8 ? 2 : 1;
    const int64_t blocks = p.weight.cols / M3_PACKED_COLS;
    const Tile<W> first(p.weight, tile), last(p.weight, tile + Tiles - 1);
    for (int m = 0; m < Rows; ++m) memset(sum + m * pitch, 0, sizeof(F32) * kSide);
    for (int64_t b = 0; b < blocks; ++b) {
      const uint8_t* block[2] = {first.block(b), last.block(b)};
      if (row == 0)
        for (int t = 0; t < Tiles; ++t) prefetch.block();
      const uint16_t* x = p.x + row * p.x_stride + b * M3_PACKED_COLS;
      F32 part[kChains][Rows][kSide] = {};
#pragma GCC unroll 16
      for (int k = 0; k < kPairs; ++k) {
        F32(&to)[Rows][kSide] = part[k % kChains];
#pragma GCC unroll 8
        for (int v = 0; v < kSide; ++v) {
          const U32 w = W::pairs(block[v / kParts], k, v % kParts);
#pragma GCC unroll 8
          for (int m = 0; m < Rows; ++m)
            to[m][v] = dot_pairs(to[m][v], w, broadcast(pair_at(x + m * p.x_stride + 2 * k)));
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
      for (int v = 0; v < kSide; ++v) (v < kParts ? first : last).load_scales(b, v % kParts, &d[v], &shift[v]);
      add_block<W, Rows, kSide>(part[0], d, shift, p.sums + row * blocks + b, blocks, sum, pitch);
    }
  }

  // Expanded weights of up to 256 columns (four tiles of them are 32 KiB: L1), multiplied again and again.
  template <class W>
  struct Panel {
    static constexpr int kTiles = 4, kCols = 256;
    static constexpr int kStep = 4;  // rows of x that are multiplied by it at once

    alignas(64) uint32_t pairs[kCols / 2 * kTiles * M3_PACKED_ROWS];
    alignas(64) float scale[kCols / M3_PACKED_COLS * kTiles * M3_PACKED_ROWS];
    alignas(64) float shift[kCols / M3_PACKED_COLS * kTiles * M3_PACKED_ROWS];
    int64_t first, blocks;  // of columns

    // sums [rows, pitch] = rows [row, row + rows) of x times `count` tiles.
    void run(const M3PackedLinearParams& p, const int64_t* tiles, int count, int64_t row, int64_t rows, float* sum,
             int64_t pitch) {
      for (int t = 0; t < count;)
        if (count - t >= kTiles)
          run<kTiles>(p, tiles + t, row, rows, sum + t * M3_PACKED_ROWS, pitch), t += kTiles;
        else
          run<1>(p, tiles + t, row, rows, sum + t * M3_PACKED_ROWS, pitch), t += 1;
    }

   private:
    template <int Tiles>
    void run(const M3PackedLinearParams& p, const int64_t* tiles, int64_t row, int64_t rows, float* sum,
             int64_t pitch) {
      const int64_t total = p.weight.cols / M3_PACKED_COLS, most = kCols / M3_PACKED_COLS;
      const int64_t passes = (total + most - 1) / most, each = passes > 0 ? (total + passes - 1) / passes : 0;
      for (int64_t m = 0; m < rows; ++m) memset(sum + m * pitch, 0, sizeof(float) * Tiles * M3_PACKED_ROWS);
      for (first = 0; first < total; first += each) {
        blocks = total - first < each ? total - first : each;
        expand<Tiles>(p.weight, tiles);
        multiply_rows<Tiles>(p, row, rows, sum, pitch);
      }
    }

    template <int Tiles>
    void expand(const M3PackedWeight& w, const int64_t* tiles) {
      constexpr int kSide = Tiles * kParts;
      for (int t = 0; t < Tiles; ++t) {
        const Tile<W> at(w, tiles[t]);
        for (int64_t b = 0; b < blocks; ++b) {
          const uint8_t* block = at.block(first + b);
          for (int k = 0; k < kPairs; ++k)
            for (int v = 0; v < kParts; ++v) {
              const U32 pair = W::pairs(block, k, v);
              memcpy(pairs + ((b * kPairs + k) * kSide + t * kParts + v) * kLanes, &pair, sizeof pair);
            }
          for (int v = 0; v < kParts; ++v) {
            F32 d = {}, m = {};
            at.load_scales(first + b, v, &d, &m);
            if constexpr (W::kScaled) store(scale + (b * kSide + t * kParts + v) * kLanes, d);
            if constexpr (W::kShifted) store(shift + (b * kSide + t * kParts + v) * kLanes, m);
          }
        }
      }
    }

    // sum += x times the panel, for Rows rows; sums [.., total] are those of x's blocks.
    template <int Rows, int Tiles>
    void multiply(const uint16_t* x, int64_t stride, const float* sums, int64_t total, float* to, int64_t pitch) const {
      constexpr int kSide = Tiles * kParts;
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
        add_block<W, Rows, kSide>(part, d, s, sums + first + b, total, to, pitch);
      }
    }

    template <int Tiles>
    void multiply_rows(const M3PackedLinearParams& p, int64_t row, int64_t rows, float* sum, int64_t pitch) const {
      const int64_t total = p.weight.cols / M3_PACKED_COLS;
      for (int64_t m = 0; m < rows;) {
        const uint16_t* x = p.x + (row + m) * p.x_stride;
        const float* sums = p.sums + (row + m) * total;
        float* to = sum + m * pitch;
        const int64_t left = rows - m;
        if (left >= kStep)
          multiply<kStep, Tiles>(x, p.x_stride, sums, total, to, pitch), m += kStep;
        else if (left >= 2)
          multiply<2, Tiles>(x, p.x_stride, sums, total, to, pitch), m += 2;
        else
          multiply<1, Tiles>(x, p.x_stride, sums, total, to, pitch), m += 1;
      }
    }
  };
};

}  // namespace
}  // namespace M3_LEVEL
}  // namespace m3
