// Products on tile registers (level amx): a block of a bf16 weight, 32 columns of 16 rows, is a tile as it lies, and so is
// a block of x. Quantised integers, exact in bf16, are expanded into such tiles first; their scales are applied to the
// sums of a block, which leave the tile registers for that.
#pragma once

#include "common/tile_gemm.h"
#include "packed_linear/by_pairs.h"

namespace m3 {
namespace M3_LEVEL {
namespace {

#if defined(__AMX_BF16__)

struct ByTiles {
  // A product of tiles takes as long for one row as for sixteen.
  static constexpr int kDirect = 2, kGroup = 2, kDirectTiles = 1;

  template <class W, int Rows, int Tiles>
  static void direct(const M3PackedLinearParams& p, int64_t tile, int64_t row, Prefetch& prefetch, float* sum,
                     int64_t pitch) {
    ByPairs::direct<W, Rows, Tiles>(p, tile, row, prefetch, sum, pitch);
  }

  template <class W>
  struct Panel {
    static constexpr int kTiles = 4, kBlocks = 8;
    static constexpr int kInFlight = 4;  // sums of blocks between tile registers and vectors

    alignas(64) uint32_t pairs[kBlocks][kTiles][kTileWords];  // expanded weights: 32 KiB
    alignas(64) float part[kInFlight][kTileWords];
    alignas(64) float sums[kTileSide][kBlocks];  // of x's blocks
    TileRegisters registers;

    // sums [rows, pitch] = rows [row, row + rows) of x times `count` tiles.
    void run(const M3PackedLinearParams& p, const int64_t* tiles, int count, int64_t row, int64_t rows, float* sum,
             int64_t pitch) {
      if constexpr (!W::kScaled)
        whole(p, tiles, count, row, rows, sum, pitch);
      else if (rows <= kTileSide)  // once through the weight, in the order of memory
        for (int t = 0; t < count; ++t) scaled<1>(p, tiles + t, row, rows, sum + t * M3_PACKED_ROWS, pitch);
      else
        for (int t = 0; t < count;)
          if (count - t >= kTiles)
            scaled<kTiles>(p, tiles + t, row, rows, sum + t * M3_PACKED_ROWS, pitch), t += kTiles;
          else
            scaled<1>(p, tiles + t, row, rows, sum + t * M3_PACKED_ROWS, pitch), t += 1;
    }

   private:
    // ---- weights that need no scales: tiles of them from where they lie, sums over all columns in tile registers

    void whole(const M3PackedLinearParams& p, const int64_t* tiles, int count, int64_t row, int64_t rows, float* sum,
               int64_t pitch) {
      Prefetch prefetch(p.weight, tiles[0], m3_packed_tiles(&p.weight));
      for (int64_t m = 0; m < rows; m += 2 * kTileSide) {
        const int left = static_cast<int>(rows - m < 2 * kTileSide ? rows - m : 2 * kTileSide);
        const int upper = left < kTileSide ? left : kTileSide, lower = left - upper;
        registers.shape(upper, lower > 0 ? lower : kTileSide);
        const uint16_t* x = p.x + (row + m) * p.x_stride;
        float* to = sum + m * pitch;
        for (int t = 0; t < count; t += 2, to += 2 * M3_PACKED_ROWS) {
          const bool right = t + 1 < count;
          const uint8_t *first = data(p.weight, tiles[t]), *second = data(p.weight, tiles[t + right]);
          Prefetch* const ahead = m == 0 ? &prefetch : nullptr;
          if (lower > 0)
            right ? step<true, true>(p, x, first, second, ahead, to, pitch)
                  : step<true, false>(p, x, first, second, ahead, to, pitch);
          else
            right ? step<false, true>(p, x, first, second, ahead, to, pitch)
                  : step<false, false>(p, x, first, second, ahead, to, pitch);
        }
      }
    }

    static const uint8_t* data(const M3PackedWeight& w, int64_t tile) {
      return w.data + tile * m3_packed_tile_bytes(&w);
    }

    template <bool Lower, bool Right>
    static void step(const M3PackedLinearParams& p, const uint16_t* x, const uint8_t* first, const uint8_t* second,
                     Prefetch* prefetch, float* to, int64_t pitch) {
      constexpr int64_t kBlockBytes = 4 * kTileWords;
      const uint16_t* below = x + kTileSide * p.x_stride;
      tile_zero<0>(), tile_zero<1>(), tile_zero<2>(), tile_zero<3>();
      for (int64_t b = 0; b < p.weight.cols / M3_PACKED_COLS; ++b, x += M3_PACKED_COLS, below += M3_PACKED_COLS) {
        if (prefetch != nullptr)
          for (int i = 0; i <= Right; ++i) prefetch->block();
        tile_load<4>(x, 2 * p.x_stride);
        tile_load<6>(first + b * kBlockBytes, 64);
        tile_dot<0, 4, 6>();
        if constexpr (Right) {
          tile_load<7>(second + b * kBlockBytes, 64);
          tile_dot<1, 4, 7>();
        }
        if constexpr (Lower) {
          tile_load<5>(below, 2 * p.x_stride);
          tile_dot<2, 5, 6>();
        }
        if constexpr (Lower && Right) tile_dot<3, 5, 7>();
      }
      float* const under = to + kTileSide * pitch;
      tile_store<0>(to, 4 * pitch);
      if constexpr (Right) tile_store<1>(to + M3_PACKED_ROWS, 4 * pitch);
      if constexpr (Lower) tile_store<2>(under, 4 * pitch);
      if constexpr (Lower && Right) tile_store<3>(under + M3_PACKED_ROWS, 4 * pitch);
    }

    // ---- weights with scales per block

    template <int Tiles>
    void scaled(const M3PackedLinearParams& p, const int64_t* tiles, int64_t row, int64_t rows, float* sum,
                int64_t pitch) {
      const int64_t total = p.weight.cols / M3_PACKED_COLS;
      const int64_t passes = (total + kBlocks - 1) / kBlocks, each = passes > 0 ? (total + passes - 1) / passes : 0;
      Prefetch prefetch(p.weight, tiles[0], m3_packed_tiles(&p.weight));
      if (total == 0)
        for (int64_t m = 0; m < rows; ++m) memset(sum + m * pitch, 0, sizeof(float) * Tiles * M3_PACKED_ROWS);
      for (int64_t first = 0; first < total; first += each) {
        const int blocks = static_cast<int>(total - first < each ? total - first : each);
        for (int t = 0; t < Tiles; ++t)
          for (int b = 0; b < blocks; ++b) {
            if constexpr (Tiles == 1) prefetch.block();
            expand(Tile<W>(p.weight, tiles[t]).block(first + b), pairs[b][t]);
          }
        for (int64_t m = 0; m < rows; m += kTileSide) {
          const int height = static_cast<int>(rows - m < kTileSide ? rows - m : kTileSide);
          registers.shape(height, kTileSide);
          if constexpr (W::kShifted)
            for (int i = 0; i < height; ++i)
              memcpy(sums[i], p.sums + (row + m + i) * total + first, sizeof(float) * blocks);
          const uint16_t* x = p.x + (row + m) * p.x_stride + first * M3_PACKED_COLS;
          for (int t = 0; t < Tiles; ++t) {
            float* to = sum + m * pitch + t * M3_PACKED_ROWS;
            const Tile<W> weight(p.weight, tiles[t]);
            if (height > 8)
              multiply<16>(x, p.x_stride, weight, first, blocks, t, first > 0, height, to, pitch);
            else
              multiply<8>(x, p.x_stride, weight, first, blocks, t, first > 0, height, to, pitch);
          }
        }
      }
    }

    static void expand(const uint8_t* block, uint32_t* to) {
#pragma GCC unroll 16
      for (int k = 0; k < kPairs; ++k) {
        const U32 pair = W::pairs(block, k, 0);
        memcpy(to + k * kTileSide, &pair, sizeof pair);
      }
    }

    void product(const uint16_t* x, int64_t stride, int block, int t) {
      tile_zero<0>();
      tile_load<4>(x + block * M3_PACKED_COLS, 2 * stride);
      tile_load<6>(pairs[block][t], 64);
      tile_dot<0, 4, 6>();
      tile_store<0>(part[block % kInFlight], 64);
    }

    // to [height, pitch] (+)= x times the panel's tile t, for at most Rows rows. While the products of one block are on
    // their way, scales are applied to those of an earlier one.
    template <int Rows>
    void multiply(const uint16_t* x, int64_t stride, const Tile<W>& weight, int64_t first, int blocks, int t, bool add,
                  int height, float* to, int64_t pitch) {
      constexpr int kAhead = kInFlight - 1;
      F32 whole[Rows] = {};
      for (int b = 0; b < kAhead && b < blocks; ++b) product(x, stride, b, t);
      for (int b = 0; b < blocks; ++b) {
        if (b + kAhead < blocks) product(x, stride, b + kAhead, t);
        F32 d = {}, shift = {};
        weight.load_scales(first + b, 0, &d, &shift);
        const float* from = part[b % kInFlight];
#pragma GCC unroll 16
        for (int m = 0; m < Rows; ++m) {
          whole[m] += d * load(from + m * kTileSide);
          if constexpr (W::kShifted) whole[m] += shift * sums[m][b];
        }
      }
#pragma GCC unroll 16
      for (int m = 0; m < Rows; ++m) {
        if (m >= height) break;
        float* const row = to + m * pitch;
        store(row, add ? load(row) + whole[m] : whole[m]);
      }
    }
  };
};

#endif  // __AMX_BF16__

}  // namespace
}  // namespace M3_LEVEL
}  // namespace m3
