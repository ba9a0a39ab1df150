// Products on tile registers (level amx): a block of a bf16 weight, 32 columns of 16 rows, is a tile as it lies, and so is
// a block of x. Quantised weights become such tiles first. For up to 16 rows of x integers do, exact in bf16, whose sums
// leave the tile registers after every block to be scaled. For more it pays to expand whole weights, d q + m, as sums of
// two bf16 (16 bits of mantissa), whose products stay in the tile registers through all columns.
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

  template <class W, int Rows, int Tiles, class Fetch>
  static void direct(const M3PackedLinearParams& p, int64_t tile, int64_t row, Fetch& prefetch, float* sum,
                     int64_t pitch) {
    ByPairs::direct<W, Rows, Tiles>(p, tile, row, prefetch, sum, pitch);
  }

  template <class W>
  struct Panel {
    // Weights that are multiplied again and again stay in L1: 32 KiB of them.
    static constexpr int kTiles = 4, kBlocks = 8, kExpanded = 4;
    static constexpr int kInFlight = 3;  // sums of blocks between tile registers and vectors

    struct Few {
      alignas(64) uint32_t pairs[kBlocks][kTileWords];  // integers
      alignas(64) float part[kInFlight][kTileWords];
      alignas(64) float sums[kTileSide][kBlocks];  // of x's blocks
    };
    struct Many {
      alignas(64) uint32_t pairs[kTiles][kExpanded][2][kTileWords];  // the larger and the smaller part of whole weights
    };
    union {
      Few few;
      Many many;
    };
    TileRegisters registers;
    Panel() {}

    // sums [rows, pitch] = rows [row, row + rows) of x times `count` tiles.
    void run(const M3PackedLinearParams& p, const int64_t* tiles, int count, int64_t row, int64_t rows, float* sum,
             int64_t pitch) {
      const int64_t blocks = p.weight.cols / M3_PACKED_COLS;
      if (blocks == 0) {
        for (int64_t m = 0; m < rows; ++m) memset(sum + m * pitch, 0, sizeof(float) * count * M3_PACKED_ROWS);
      } else if constexpr (!W::kScaled) {
        as_it_lies(p, tiles, count, row, rows, sum, pitch);
      } else if (p.count > kTileSide) {
        for (int t = 0; t < count; t += kTiles)
          expanded(p, tiles + t, count - t < kTiles ? count - t : kTiles, row, rows, sum + t * M3_PACKED_ROWS, pitch);
      } else {
        for (int t = 0; t < count; ++t) scaled(p, tiles[t], row, rows, sum + t * M3_PACKED_ROWS, pitch);
      }
    }

   private:
    // ---- weights in bf16, or in two parts of it

    // Rows of x, and where the blocks of two tiles are: Parts KiB each.
    struct Operands {
      const uint16_t* x;
      int64_t stride;
      const void *first, *second;
      int64_t blocks;
    };

    template <bool Lower, bool Right, int Parts>
    static void step(const Operands& of, bool add, Prefetch* prefetch, float* to, int64_t pitch) {
      constexpr int64_t kBytes = 4 * kTileWords;
      const uint16_t *x = of.x, *below = x + kTileSide * of.stride;
      float* const under = to + kTileSide * pitch;
      tile_zero<0>(), tile_zero<1>(), tile_zero<2>(), tile_zero<3>();
      if (add) {
        tile_load<0>(to, 4 * pitch);
        if constexpr (Right) tile_load<1>(to + M3_PACKED_ROWS, 4 * pitch);
        if constexpr (Lower) tile_load<2>(under, 4 * pitch);
        if constexpr (Lower && Right) tile_load<3>(under + M3_PACKED_ROWS, 4 * pitch);
      }
      const char *first = static_cast<const char*>(of.first), *second = static_cast<const char*>(of.second);
      for (int64_t b = 0; b < of.blocks; ++b, x += M3_PACKED_COLS, below += M3_PACKED_COLS) {
        if (prefetch != nullptr)
          for (int i = 0; i <= Right; ++i) prefetch->block();
        tile_load<4>(x, 2 * of.stride);
        if constexpr (Lower) tile_load<5>(below, 2 * of.stride);
#pragma GCC unroll 2
        for (int i = 0; i < Parts; ++i, first += kBytes, second += kBytes) {
          tile_load<6>(first, 64);
          tile_dot<0, 4, 6>();
          if constexpr (Right) {
            tile_load<7>(second, 64);
            tile_dot<1, 4, 7>();
          }
          if constexpr (Lower) tile_dot<2, 5, 6>();
          if constexpr (Lower && Right) tile_dot<3, 5, 7>();
        }
      }
      tile_store<0>(to, 4 * pitch);
      if constexpr (Right) tile_store<1>(to + M3_PACKED_ROWS, 4 * pitch);
      if constexpr (Lower) tile_store<2>(under, 4 * pitch);
      if constexpr (Lower && Right) tile_store<3>(under + M3_PACKED_ROWS, 4 * pitch);
    }

    // All rows times `count` tiles; blocks_of(t) is where those of tile t begin.
    template <int Parts, class BlocksOf>
    void multiply(Operands of, int count, int64_t rows, bool add, Prefetch* prefetch, const BlocksOf& blocks_of,
                  float* sum, int64_t pitch) {
      for (int64_t m = 0; m < rows; m += 2 * kTileSide, of.x += 2 * kTileSide * of.stride) {
        const int left = static_cast<int>(rows - m < 2 * kTileSide ? rows - m : 2 * kTileSide);
        const int upper = left < kTileSide ? left : kTileSide, lower = left - upper;
        registers.shape(upper, lower > 0 ? lower : kTileSide);
        Prefetch* const ahead = m == 0 ? prefetch : nullptr;
        for (int t = 0; t < count; t += 2) {
          const bool right = t + 1 < count;
          of.first = blocks_of(t), of.second = right ? blocks_of(t + 1) : nullptr;
          float* const to = sum + m * pitch + t * M3_PACKED_ROWS;
          if (lower > 0)
            right ? step<true, true, Parts>(of, add, ahead, to, pitch) : step<true, false, Parts>(of, add, ahead, to, pitch);
          else
            right ? step<false, true, Parts>(of, add, ahead, to, pitch)
                  : step<false, false, Parts>(of, add, ahead, to, pitch);
        }
      }
    }

    void as_it_lies(const M3PackedLinearParams& p, const int64_t* tiles, int count, int64_t row, int64_t rows,
                    float* sum, int64_t pitch) {
      Prefetch prefetch(p.weight, tiles[0], m3_packed_tiles(&p.weight));
      each_panel(p.weight, rows > 2 * kTileSide ? kBlocks : p.weight.cols, [&](int64_t first, int64_t blocks) {
        const Operands of{p.x + row * p.x_stride + first * M3_PACKED_COLS, p.x_stride, nullptr, nullptr, blocks};
        const auto blocks_of = [&](int t) { return Tile<W>(p.weight, tiles[t]).block(first); };
        multiply<1>(of, count, rows, first > 0, &prefetch, blocks_of, sum, pitch);
      });
    }

    void expanded(const M3PackedLinearParams& p, const int64_t* tiles, int count, int64_t row, int64_t rows,
                  float* sum, int64_t pitch) {
      const auto blocks_of = [&](int t) { return many.pairs[t]; };
      each_panel(p.weight, kExpanded, [&](int64_t first, int64_t blocks) {
        for (int t = 0; t < count; ++t)
          for (int64_t b = 0; b < blocks; ++b) expand(Tile<W>(p.weight, tiles[t]), first + b, many.pairs[t][b]);
        const Operands of{p.x + row * p.x_stride + first * M3_PACKED_COLS, p.x_stride, nullptr, nullptr, blocks};
        multiply<2>(of, count, rows, first > 0, nullptr, blocks_of, sum, pitch);
      });
    }

    // Whole weights of a block, cut behind the 8th and the 16th bit of their mantissas.
    static void expand(const Tile<W>& tile, int64_t block, uint32_t (*to)[kTileWords]) {
      constexpr uint32_t kUpper = 0xffff0000u;
      F32 d = {}, shift = {}, scale[8];
      tile.load_scales(block, 0, &d, &shift);
#pragma GCC unroll 8
      for (int c = 0; c < 8; ++c) scale[c] = d * (1.f / W::up(c));
#pragma GCC unroll 16
      for (int k = 0; k < kPairs; ++k) {
        F32 even, odd;
        W::floats(tile.block(block), k, 0, &even, &odd);
        even = even * scale[2 * k % 8] + shift;
        odd = odd * scale[(2 * k + 1) % 8] + shift;
        const U32 e = reinterpret_cast<U32>(even), o = reinterpret_cast<U32>(odd);
        const U32 rest_e = reinterpret_cast<U32>(even - reinterpret_cast<F32>(e & kUpper));
        const U32 rest_o = reinterpret_cast<U32>(odd - reinterpret_cast<F32>(o & kUpper));
        const U32 larger = e >> 16 | (o & kUpper), smaller = rest_e >> 16 | (rest_o & kUpper);
        memcpy(to[0] + k * kTileSide, &larger, sizeof larger);
        memcpy(to[1] + k * kTileSide, &smaller, sizeof smaller);
      }
    }

    // take(first, blocks) for columns in equal parts of at most `most` blocks.
    template <class Take>
    static void each_panel(const M3PackedWeight& w, int64_t most, const Take& take) {
      const int64_t total = w.cols / M3_PACKED_COLS, parts = (total + most - 1) / most;
      const int64_t each = (total + parts - 1) / parts;
      for (int64_t first = 0; first < total; first += each) take(first, total - first < each ? total - first : each);
    }

    // ---- integers and scales: once through the weight, in the order of memory

    void scaled(const M3PackedLinearParams& p, int64_t tile, int64_t row, int64_t rows, float* sum, int64_t pitch) {
      const int64_t total = p.weight.cols / M3_PACKED_COLS;
      const Tile<W> weight(p.weight, tile);
      Prefetch prefetch(p.weight, tile, m3_packed_tiles(&p.weight));
      registers.shape(static_cast<int>(rows), kTileSide);
      // Rows that nobody asked for are scaled with the others: zeros, since arithmetic on what was there before, denormals
      // perhaps, may take a hundred times as long.
      if (rows % 8 != 0) memset(few.part, 0, sizeof few.part), memset(few.sums, 0, sizeof few.sums);
      each_panel(p.weight, kBlocks, [&](int64_t first, int64_t blocks) {
        for (int64_t b = 0; b < blocks; ++b) {
          prefetch.block();
#pragma GCC unroll 16
          for (int k = 0; k < kPairs; ++k) {
            const U32 pair = W::pairs(weight.block(first + b), k, 0);
            memcpy(few.pairs[b] + k * kTileSide, &pair, sizeof pair);
          }
        }
        if constexpr (W::kShifted)
          for (int64_t i = 0; i < rows; ++i) copy(p.sums + (row + i) * total + first, blocks, few.sums[i]);
        const uint16_t* x = p.x + row * p.x_stride + first * M3_PACKED_COLS;
        if (rows > 8)
          multiply_scaled<16>(x, p.x_stride, weight, first, blocks, rows, sum, pitch);
        else
          multiply_scaled<8>(x, p.x_stride, weight, first, blocks, rows, sum, pitch);
      });
    }

    // memcpy of a few floats, without the call.
    static void copy(const float* from, int64_t count, float* to) {
      int64_t i = 0;
      for (; i + 4 <= count; i += 4) memcpy(to + i, from + i, 4 * sizeof(float));
      if (count & 2) memcpy(to + i, from + i, 2 * sizeof(float)), i += 2;
      if (count & 1) to[i] = from[i];
    }

    void product(const uint16_t* x, int64_t stride, int64_t block) {
      tile_zero<0>();
      tile_load<4>(x + block * M3_PACKED_COLS, 2 * stride);
      tile_load<6>(few.pairs[block], 64);
      tile_dot<0, 4, 6>();
      tile_store<0>(few.part[block % kInFlight], 64);
    }

    // to [rows, pitch] (first > 0: +)= x times the panel, for at most Rows rows. While the products of one block are on
    // their way, scales are applied to those of an earlier one.
    template <int Rows>
    void multiply_scaled(const uint16_t* x, int64_t stride, const Tile<W>& weight, int64_t first, int64_t blocks,
                         int64_t rows, float* to, int64_t pitch) {
      constexpr int kAhead = kInFlight - 1;
      F32 whole[Rows] = {};
      for (int64_t b = 0; b < kAhead && b < blocks; ++b) product(x, stride, b);
      for (int64_t b = 0; b < blocks; ++b) {
        if (b + kAhead < blocks) product(x, stride, b + kAhead);
        F32 d = {}, shift = {};
        weight.load_scales(first + b, 0, &d, &shift);
        const float* part = few.part[b % kInFlight];
#pragma GCC unroll 16
        for (int m = 0; m < Rows; ++m) {
          whole[m] += d * load(part + m * kTileSide);
          if constexpr (W::kShifted) whole[m] += shift * few.sums[m][b];
        }
      }
#pragma GCC unroll 16
      for (int m = 0; m < Rows; ++m) {
        if (m >= rows) break;
        float* const row = to + m * pitch;
        store(row, first > 0 ? load(row) + whole[m] : whole[m]);
      }
    }
  };
};

#endif  // __AMX_BF16__

}  // namespace
}  // namespace M3_LEVEL
}  // namespace m3
