// Products of bf16 operands, or bytes, on tile registers (AMX), for `*.simd.cpp` files: a tile holds 16 rows of 64 bytes,
// one instruction multiplies two of them, 16 rows of A times 16 columns of B over 16 pairs, 16 times what vdpbf16ps does in
// the same time. Operands are those of common/pair_tile.h. Semantics: Intel 64 and IA-32 Architectures Software
// Developer's Manual, volume 2, TDPBF16PS: exact products, fp32 sums, denormals count as zeros.
#pragma once

#include "common/pair_tile.h"

namespace m3 {
namespace M3_LEVEL {
namespace {

#if defined(__AMX_BF16__)
constexpr bool kTileDots = true;
#else
constexpr bool kTileDots = false;
#endif

template <class T>
constexpr bool kTiled = false;
template <>
constexpr bool kTiled<BF16> = kTileDots;

#if defined(__AMX_BF16__)

constexpr int kTileSide = 16;                      // rows of a tile, columns of sums, pairs of an operand
constexpr int kTileWords = kTileSide * kTileSide;  // 1 KiB

#if defined(M3_EMULATE_AMX)
using emulated::tile_dot;
using emulated::tile_dot_bytes;
using emulated::tile_load;
using emulated::tile_release;
using emulated::tile_set_up;
using emulated::tile_store;
using emulated::tile_zero;
#else
// With "memory": GCC's own intrinsics do not say what they read.
inline void tile_set_up(const void* shapes) {
  asm volatile("ldtilecfg %0" ::"m"(*static_cast<const char(*)[64]>(shapes)));
}
inline void tile_release() { asm volatile("tilerelease"); }
template <int To>
inline void tile_zero() {
  asm volatile("tilezero %%tmm%c0" ::"i"(To));
}
template <int To>
inline void tile_load(const void* from, int64_t stride) {  // stride: bytes between rows
  asm volatile("tileloadd (%1,%2,1), %%tmm%c0" ::"i"(To), "r"(from), "r"(stride) : "memory");
}
template <int From>
inline void tile_store(void* to, int64_t stride) {
  asm volatile("tilestored %%tmm%c0, (%1,%2,1)" ::"i"(From), "r"(to), "r"(stride) : "memory");
}
template <int Sum, int A, int B>
inline void tile_dot() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(Sum), "i"(A), "i"(B));
}
template <int Sum, int A, int B>
inline void tile_dot_bytes() {  // unsigned A, signed B, four bytes for a pair, sums in int32 (TDPBUSD)
  asm volatile("tdpbusd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(Sum), "i"(A), "i"(B));
}
#endif

// The tile registers of this thread while it lives: sums 0 and 1 of upper, 2 and 3 of lower rows; 4 and 5 A's upper and
// lower rows; 6 and 7 B's columns. Given back at the end, since a thread that holds them takes longer to switch.
class TileRegisters {
 public:
  TileRegisters() { shape(kTileSide, kTileSide); }
  ~TileRegisters() { tile_release(); }
  TileRegisters(const TileRegisters&) = delete;

  // Numbers of rows. Costs some 50 ns where they differ from the present ones.
  void shape(int upper, int lower) {
    if (upper == upper_ && lower == lower_) return;
    struct {
      uint8_t palette = 1, start = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {};
      uint8_t rows[16] = {};
    } shapes;
    static_assert(sizeof shapes == 64);
    upper_ = upper, lower_ = lower;
    for (int i = 0; i < 8; ++i) {
      shapes.row_bytes[i] = 64;
      shapes.rows[i] = static_cast<uint8_t>(i >= 6 ? kTileSide : i == 2 || i == 3 || i == 5 ? lower : upper);
    }
    tile_set_up(&shapes);
  }

 private:
  int upper_ = 0, lower_ = 0;
};

// Sums of one or two tiles of rows by one or two of columns; depth in pairs, a multiple of 16.
template <bool Lower, bool Right, bool Add>
inline void tile_step(const uint32_t* a, int64_t lda, const uint32_t* b, int64_t ldb, int depth, float* c,
                      int64_t ldc) {
  float* const below = c + kTileSide * ldc;
  if constexpr (Add) {
    tile_load<0>(c, 4 * ldc);
    if constexpr (Right) tile_load<1>(c + kTileSide, 4 * ldc);
    if constexpr (Lower) tile_load<2>(below, 4 * ldc);
    if constexpr (Lower && Right) tile_load<3>(below + kTileSide, 4 * ldc);
  } else {
    tile_zero<0>(), tile_zero<1>(), tile_zero<2>(), tile_zero<3>();
  }
  for (int d = 0; d < depth; d += kTileSide) {
    tile_load<6>(b + d * ldb, 4 * ldb);
    tile_load<4>(a + d, 4 * lda);
    tile_dot<0, 4, 6>();
    if constexpr (Right) {
      tile_load<7>(b + d * ldb + kTileSide, 4 * ldb);
      tile_dot<1, 4, 7>();
    }
    if constexpr (Lower) {
      tile_load<5>(a + kTileSide * lda + d, 4 * lda);
      tile_dot<2, 5, 6>();
    }
    if constexpr (Lower && Right) tile_dot<3, 5, 7>();
  }
  tile_store<0>(c, 4 * ldc);
  if constexpr (Right) tile_store<1>(c + kTileSide, 4 * ldc);
  if constexpr (Lower) tile_store<2>(below, 4 * ldc);
  if constexpr (Lower && Right) tile_store<3>(below + kTileSide, 4 * ldc);
}

template <bool Lower, bool Add>
inline void tile_rows(const uint32_t* a, int64_t lda, const uint32_t* b, int64_t ldb, int n, int depth, float* c,
                      int64_t ldc) {
  int j = 0;
  for (; j + 2 * kTileSide <= n; j += 2 * kTileSide)
    tile_step<Lower, true, Add>(a, lda, b + j, ldb, depth, c + j, ldc);
  if (j < n) tile_step<Lower, false, Add>(a, lda, b + j, ldb, depth, c + j, ldc);
}

// C[m, n] = A B, or C += A B: as pair_gemm, with depth, too, a multiple of 16 pairs. Rows beyond a multiple of 16 cost a
// change of shape: where A can be read and C written up to the next one, pass that as m.
template <bool Add>
inline void tile_gemm(TileRegisters& tiles, const uint32_t* a, int64_t lda, const uint32_t* b, int64_t ldb, int m,
                      int n, int depth, float* c, int64_t ldc) {
  for (int i = 0; i < m; i += 2 * kTileSide, a += 2 * kTileSide * lda, c += 2 * kTileSide * ldc) {
    const int upper = m - i < kTileSide ? m - i : kTileSide, lower = m - i - upper;
    if (lower > 0) {
      tiles.shape(upper, lower < kTileSide ? lower : kTileSide);
      tile_rows<true, Add>(a, lda, b, ldb, n, depth, c, ldc);
    } else {
      tiles.shape(upper, kTileSide);
      tile_rows<false, Add>(a, lda, b, ldb, n, depth, c, ldc);
    }
  }
}

#endif  // __AMX_BF16__

}  // namespace
}  // namespace M3_LEVEL
}  // namespace m3
