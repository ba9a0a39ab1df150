// Products of floats (levels without an instruction for bf16 pairs): a column of an activation is broadcast to all lanes
// of a weight, converted first. Few rows keep the integers and scale the sums of a block; many rows multiply a panel of
// whole weights, d q + m, rounded once.
#pragma once

#include "packed_linear/formats.h"

namespace m3 {
namespace M3_LEVEL {
namespace {

struct ByFloats {
  static constexpr int kGroup = kLanes == 16 ? 8 : kLanes == 8 ? 4 : 2;  // rows of x that share an expanded weight
  static constexpr int kDirect = kGroup;  // up to so many rows, weights are expanded in registers
  static constexpr int kDirectTiles = 1;

  // 1 / up of every column of a block.
  template <class W>
  static constexpr Columns down() {
    Columns c{};
    for (int i = 0; i < M3_PACKED_COLS; ++i) c.at[i] = 1.f / W::up(i);
    return c;
  }

  // sum [Rows, pitch] = rows of x from `row` on times a tile.
  template <class W, int Rows, int Tiles, class Fetch>
  static void direct(const M3PackedLinearParams& p, int64_t tile, int64_t row, Fetch& prefetch, float* sum,
                     int64_t pitch) {
    static_assert(Tiles == 1);
    alignas(64) static constexpr Columns kDown = down<W>();
    constexpr int kChains = Rows * kParts >= 8 ? 1 : Rows * kParts >= 4 ? 2 : 4;  // eight sums hide an addition
    const int64_t blocks = p.weight.cols / M3_PACKED_COLS;
    const Tile<W> weights(p.weight, tile);
    F32 whole[Rows][kParts] = {};
    for (int64_t b = 0; b < blocks; ++b) {
      if (row == 0) prefetch.block();
      alignas(64) float x[Rows][M3_PACKED_COLS];
      for (int m = 0; m < Rows; ++m) {
        const BF16* from =
            reinterpret_cast<const BF16*>(p.x + (row + m) * p.x_stride + b * M3_PACKED_COLS);
        for (int c = 0; c < M3_PACKED_COLS; c += kLanes) store(x[m] + c, load(from + c) * load(kDown.at + c));
      }
      const uint8_t* block = weights.block(b);
      F32 part[kChains][Rows][kParts] = {};
#pragma GCC unroll 16
      for (int k = 0; k < kPairs; ++k)
#pragma GCC unroll 4
        for (int v = 0; v < kParts; ++v) {
          F32 even, odd;
          W::floats(block, k, v, &even, &odd);
#pragma GCC unroll 8
          for (int m = 0; m < Rows; ++m) {
            F32& first = part[2 * k % kChains][m][v];
            first += even * x[m][2 * k];
            F32& second = part[(2 * k + 1) % kChains][m][v];
            second += odd * x[m][2 * k + 1];
          }
        }
#pragma GCC unroll 4
      for (int v = 0; v < kParts; ++v) {
        F32 d, shift;
        weights.load_scales(b, v, &d, &shift);
#pragma GCC unroll 8
        for (int m = 0; m < Rows; ++m) {
          F32 total = part[0][m][v];
#pragma GCC unroll 4
          for (int c = 1; c < kChains; ++c) total += part[c][m][v];
          if constexpr (W::kScaled)
            whole[m][v] += d * total;
          else
            whole[m][v] += total;
          if constexpr (W::kShifted) whole[m][v] += shift * p.sums[(row + m) * blocks + b];
        }
      }
    }
    for (int m = 0; m < Rows; ++m)
      for (int v = 0; v < kParts; ++v) store(sum + m * pitch + v * kLanes, whole[m][v]);
  }

  // Whole weights of up to 64 columns: four tiles of them are 16 KiB.
  template <class W>
  struct Panel {
    static constexpr int kTiles = 4, kCols = 64;
    static constexpr int kStep = 12 / kParts;  // rows of x that are multiplied by it at once: twelve sums

    alignas(64) float weights[kTiles][kCols][M3_PACKED_ROWS];
    alignas(64) float x[kStep][kCols];

    // sums [rows, pitch] = rows [row, row + rows) of x times `count` tiles.
    void run(const M3PackedLinearParams& p, const int64_t* tiles, int count, int64_t row, int64_t rows, float* sum,
             int64_t pitch) {
      for (int64_t m = 0; m < rows; ++m) memset(sum + m * pitch, 0, sizeof(float) * count * M3_PACKED_ROWS);
      for (int t = 0; t < count; t += kTiles) {
        const int n = count - t < kTiles ? count - t : kTiles;
        for (int64_t first = 0; first < p.weight.cols; first += kCols) {
          const int cols = static_cast<int>(p.weight.cols - first < kCols ? p.weight.cols - first : kCols);
          for (int i = 0; i < n; ++i) expand(p.weight, tiles[t + i], first, cols, weights[i]);
          multiply_rows(p.x + row * p.x_stride + first, p.x_stride, rows, n, cols, sum + t * M3_PACKED_ROWS, pitch);
        }
      }
    }

   private:
    static void expand(const M3PackedWeight& w, int64_t tile, int64_t first, int cols, float (*to)[M3_PACKED_ROWS]) {
      const Tile<W> at(w, tile);
      for (int b = 0; b < cols / M3_PACKED_COLS; ++b, to += M3_PACKED_COLS)
        for (int v = 0; v < kParts; ++v) {
          const uint8_t* block = at.block(first / M3_PACKED_COLS + b);
          F32 d, shift;
          at.load_scales(first / M3_PACKED_COLS + b, v, &d, &shift);
          const auto put = [&](int column, F32 weight) {
            if constexpr (W::kScaled) weight *= d * (1.f / W::up(column));
            if constexpr (W::kShifted) weight += shift;
            store(to[column] + v * kLanes, weight);
          };
#pragma GCC unroll 16
          for (int k = 0; k < kPairs; ++k) {
            F32 even, odd;
            W::floats(block, k, v, &even, &odd);
            put(2 * k, even);
            put(2 * k + 1, odd);
          }
        }
    }

    template <int Rows>
    void multiply(int n, int cols, float* sum, int64_t pitch) const {
      for (int t = 0; t < n; ++t, sum += M3_PACKED_ROWS) {
        F32 total[Rows][kParts];
#pragma GCC unroll 12
        for (int m = 0; m < Rows; ++m)
#pragma GCC unroll 4
          for (int v = 0; v < kParts; ++v) total[m][v] = load(sum + m * pitch + v * kLanes);
        for (int c = 0; c < cols; ++c) {
          F32 w[kParts];
#pragma GCC unroll 4
          for (int v = 0; v < kParts; ++v) w[v] = load(weights[t][c] + v * kLanes);
#pragma GCC unroll 12
          for (int m = 0; m < Rows; ++m)
#pragma GCC unroll 4
            for (int v = 0; v < kParts; ++v) total[m][v] += w[v] * x[m][c];
        }
#pragma GCC unroll 12
        for (int m = 0; m < Rows; ++m)
#pragma GCC unroll 4
          for (int v = 0; v < kParts; ++v) store(sum + m * pitch + v * kLanes, total[m][v]);
      }
    }

    // Rows in steps of at most kStep, as even as they come.
    void multiply_rows(const uint16_t* from, int64_t stride, int64_t rows, int n, int cols, float* sum, int64_t pitch) {
      for (int64_t steps = (rows + kStep - 1) / kStep; steps > 0; --steps) {
        const int64_t step = (rows + steps - 1) / steps;
        for (int64_t m = 0; m < step; ++m)
          for (int c = 0; c < cols; c += kLanes)
            store(x[m] + c, load(reinterpret_cast<const BF16*>(from + m * stride + c)));
        multiply_some<kStep>(static_cast<int>(step), n, cols, sum, pitch);
        rows -= step, from += step * stride, sum += step * pitch;
      }
    }

    template <int Most>
    void multiply_some(int rows, int n, int cols, float* sum, int64_t pitch) const {
      if (rows == Most) return multiply<Most>(n, cols, sum, pitch);
      if constexpr (Most > 1) multiply_some<Most - 1>(rows, n, cols, sum, pitch);
    }
  };
};

}  // namespace
}  // namespace M3_LEVEL
}  // namespace m3
