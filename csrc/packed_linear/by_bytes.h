// Products of bytes, four columns at a time, for mxint8 activations and quantised weights (levels that have an instruction
// for it and no tile registers): half the products of bf16 pairs. Weights are unsigned bytes, kZero too large, which the
// sum of a block of x makes good; sums of a block are exact in int32 and in float32.
#pragma once

#include "packed_linear/formats.h"

namespace m3 {
namespace M3_LEVEL {
namespace {

#if defined(M3_BYTE_PRODUCTS)

struct ByBytes {
  static constexpr int kDirect = 16;  // up to so many rows of x, weights are expanded in registers
  static constexpr int kGroup = 8;    // rows of x that share an expanded weight there
  static constexpr int kDirectTiles = 1;
  static constexpr int kEights = M3_PACKED_COLS / 8;
  static_assert(kParts == 1);

  // Four columns of a row of x in all lanes; `quad` counts them from the row's first.
  static inline U32 broadcast(const int8_t* row, int64_t quad) { return all_lanes(four_at(row + 4 * quad)); }

  static inline const int8_t* row_of(const M3PackedLinearParams& p, int64_t row) {
    return reinterpret_cast<const int8_t*>(p.x) + row * p.x_stride;
  }

  // A block of x, in the order in which quads() of the format takes columns.
  static inline void store_bytes(m3_weight_format format, const I32 (&q)[M3_PACKED_COLS / kLanes], int8_t* to) {
    const __m128i order = _mm_setr_epi8(0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15);
    typedef int8_t Bytes __attribute__((vector_size(kLanes)));
    for (int i = 0; i < M3_PACKED_COLS / kLanes; ++i) {
      const __m128i bytes = reinterpret_cast<__m128i>(__builtin_convertvector(q[i], Bytes));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i * kLanes),
                       format == M3_WEIGHT_Q4_1 ? _mm_shuffle_epi8(bytes, order) : bytes);
    }
  }

  // Of a block, for add_block: where a zero point is a shift, x's scale, a power of two, will be added to d's exponent. So
  // d = 0 is 2^-60 there, and what is not finite goes into the shift.
  template <class W>
  static inline void load_scales(const Tile<W>& tile, int64_t b, F32* d, F32* shift) {
    tile.load_scales(b, 0, d, shift);
    if constexpr (W::kShifted) {
      *shift += *d - *d;
      *d = select(*d == 0.f, splat(0x1p-60f), *d);
    }
  }

  // whole + d (x's scale times the sum of a block, less what the weights are too large) + shift (x's sum)
  template <class W>
  static inline F32 add_block(F32 whole, I32 part, F32 d, F32 shift, float scale, float sum) {
    const F32 products = __builtin_convertvector(part, F32);
    if constexpr (W::kShifted) {
      int32_t power;
      memcpy(&power, &scale, sizeof power);
      constexpr int32_t kOne = 127 << 23;
      whole += reinterpret_cast<F32>(reinterpret_cast<I32>(d) + (power - kOne)) * products;
      return whole + shift * sum;  // NaN where the scale is
    }
    return whole + d * (products * scale - splat(static_cast<float>(W::kZero) * sum));
  }

  // sum [Rows, pitch] = rows of x from `row` on times a tile.
  template <class W, int Rows, int Tiles, class Fetch>
  static void direct(const M3PackedLinearParams& p, int64_t tile, int64_t row, Fetch& prefetch, float* sum,
                     int64_t pitch) {
    static_assert(Tiles == 1);
    constexpr int kChains = Rows <= 1 ? 4 : Rows <= 2 ? 2 : 1;  // four sums hide a product's latency
    const int64_t blocks = p.weight.cols / M3_PACKED_COLS;
    const Tile<W> weights(p.weight, tile);
    const int8_t* const x = row_of(p, row);
    const float *scales = p.scales + row * blocks, *sums = p.sums + row * blocks;
    F32 whole[Rows] = {};
    for (int64_t b = 0; b < blocks; ++b) {
      if (row == 0) prefetch.block();
      const uint8_t* const block = weights.block(b);
      I32 part[kChains][Rows] = {};
#pragma GCC unroll 4
      for (int i = 0; i < kEights; ++i) {
        U32 w[2];
        W::quads(block, i, &w[0], &w[1]);
#pragma GCC unroll 2
        for (int q = 0; q < 2; ++q)
#pragma GCC unroll 8
          for (int m = 0; m < Rows; ++m) {
            I32& to = part[(2 * i + q) % kChains][m];
            to = dot_bytes(to, w[q], broadcast(x + m * p.x_stride, 2 * (kEights * b + i) + q));
          }
      }
      F32 d = {}, shift = {};
      load_scales(weights, b, &d, &shift);
#pragma GCC unroll 8
      for (int m = 0; m < Rows; ++m) {
        I32 total = part[0][m];
#pragma GCC unroll 4
        for (int c = 1; c < kChains; ++c) total += part[c][m];
        whole[m] = add_block<W>(whole[m], total, d, shift, scales[m * blocks + b], sums[m * blocks + b]);
      }
    }
#pragma GCC unroll 8
    for (int m = 0; m < Rows; ++m) store(sum + m * pitch, whole[m]);
  }

  // Expanded weights of up to 256 columns (four tiles of them are 16 KiB: L1), multiplied again and again.
  template <class W>
  struct Panel {
    static constexpr int kTiles = 4, kBlocks = 8;
    static constexpr int kStep = 3;  // rows of x that are multiplied by it at once: all their sums are registers

    alignas(64) U32 quads[kBlocks][2 * kEights][kTiles];
    alignas(64) F32 scale[kBlocks][kTiles], shift[kBlocks][kTiles];

    // sums [rows, pitch] = rows [row, row + rows) of x times `count` tiles.
    void run(const M3PackedLinearParams& p, const int64_t* tiles, int count, int64_t row, int64_t rows, float* sum,
             int64_t pitch) {
      int t = 0;
      for (; t + kTiles <= count; t += kTiles) run<kTiles>(p, tiles + t, row, rows, sum + t * M3_PACKED_ROWS, pitch);
      for (; t < count; ++t) run<1>(p, tiles + t, row, rows, sum + t * M3_PACKED_ROWS, pitch);
    }

   private:
    template <int Tiles>
    void run(const M3PackedLinearParams& p, const int64_t* tiles, int64_t row, int64_t rows, float* sum,
             int64_t pitch) {
      const int64_t total = p.weight.cols / M3_PACKED_COLS, passes = (total + kBlocks - 1) / kBlocks;
      const int64_t each = passes > 0 ? (total + passes - 1) / passes : 0;
      for (int64_t m = 0; m < rows; ++m) memset(sum + m * pitch, 0, sizeof(float) * Tiles * M3_PACKED_ROWS);
      for (int64_t first = 0; first < total; first += each) {
        const int64_t blocks = total - first < each ? total - first : each;
        for (int t = 0; t < Tiles; ++t) expand(Tile<W>(p.weight, tiles[t]), first, blocks, t);
        multiply_rows<Tiles>(p, row, rows, first, blocks, sum, pitch);
      }
    }

    void expand(const Tile<W>& tile, int64_t first, int64_t blocks, int t) {
      for (int64_t b = 0; b < blocks; ++b) {
#pragma GCC unroll 4
        for (int i = 0; i < kEights; ++i)
          W::quads(tile.block(first + b), i, &quads[b][2 * i][t], &quads[b][2 * i + 1][t]);
        load_scales(tile, first + b, &scale[b][t], &shift[b][t]);
      }
    }

    // sum += Rows rows of x, from block `first` on, times the panel.
    template <int Rows, int Tiles>
    void multiply(const M3PackedLinearParams& p, int64_t row, int64_t first, int64_t blocks, float* sum,
                  int64_t pitch) const {
      const int64_t total = p.weight.cols / M3_PACKED_COLS;
      const int8_t* const x = row_of(p, row);
      const float *scales = p.scales + row * total + first, *sums = p.sums + row * total + first;
      F32 whole[Rows][Tiles];
#pragma GCC unroll 8
      for (int m = 0; m < Rows; ++m)
#pragma GCC unroll 4
        for (int v = 0; v < Tiles; ++v) whole[m][v] = load(sum + m * pitch + v * kLanes);
      for (int64_t b = 0; b < blocks; ++b) {
        I32 part[Rows][Tiles] = {};
#pragma GCC unroll 8
        for (int q = 0; q < 2 * kEights; ++q) {
          U32 w[Tiles];
#pragma GCC unroll 4
          for (int v = 0; v < Tiles; ++v) {
            w[v] = quads[b][q][v];
            M3_OPAQUE(w[v]);
          }
#pragma GCC unroll 8
          for (int m = 0; m < Rows; ++m) {
            const U32 a = broadcast(x + m * p.x_stride, 2 * kEights * (first + b) + q);
#pragma GCC unroll 4
            for (int v = 0; v < Tiles; ++v) part[m][v] = dot_bytes(part[m][v], w[v], a);
          }
        }
#pragma GCC unroll 8
        for (int m = 0; m < Rows; ++m)
#pragma GCC unroll 4
          for (int v = 0; v < Tiles; ++v)
            whole[m][v] = add_block<W>(whole[m][v], part[m][v], scale[b][v], shift[b][v], scales[m * total + b],
                                       sums[m * total + b]);
      }
#pragma GCC unroll 8
      for (int m = 0; m < Rows; ++m)
#pragma GCC unroll 4
        for (int v = 0; v < Tiles; ++v) store(sum + m * pitch + v * kLanes, whole[m][v]);
    }

    template <int Tiles>
    void multiply_rows(const M3PackedLinearParams& p, int64_t row, int64_t rows, int64_t first, int64_t blocks,
                       float* sum, int64_t pitch) const {
      int64_t m = 0;
      for (; m + kStep <= rows; m += kStep) multiply<kStep, Tiles>(p, row + m, first, blocks, sum + m * pitch, pitch);
      for (; m + 2 <= rows; m += 2) multiply<2, Tiles>(p, row + m, first, blocks, sum + m * pitch, pitch);
      if (m < rows) multiply<1, Tiles>(p, row + m, first, blocks, sum + m * pitch, pitch);
    }
  };
};

#endif  // M3_BYTE_PRODUCTS

}  // namespace
}  // namespace M3_LEVEL
}  // namespace m3
