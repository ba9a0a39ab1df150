// Level amx on a CPU without tile registers: after avx512.h, in front of every `*.simd.cpp` (-include). The registers are
// an array of the thread's; shapes are checked where the hardware would fault, and a tile that is used without a shape
// traps. Semantics: Intel 64 and IA-32 Architectures Software Developer's Manual, volume 2.
#pragma once

#define __AMX_TILE__ 1
#define __AMX_BF16__ 1

namespace {
namespace emulated {

struct Tiles {
  uint16_t row_bytes[8] = {};
  uint8_t rows[8] = {};
  float at[8][16][16];
};
inline Tiles& tiles() {
  static thread_local Tiles tiles;
  return tiles;
}

inline void tile_set_up(const void* shapes) {  // [64] bytes: palette, ..., at 16 the bytes of a row, at 48 the rows
  const uint8_t* byte = static_cast<const uint8_t*>(shapes);
  if (byte[0] != 1) __builtin_trap();
  tiles() = {};
  memcpy(tiles().row_bytes, byte + 16, sizeof tiles().row_bytes);
  memcpy(tiles().rows, byte + 48, sizeof tiles().rows);
  for (int i = 0; i < 8; ++i)
    if (tiles().rows[i] > 16 || tiles().row_bytes[i] > 64) __builtin_trap();
}
inline void tile_release() { tiles() = {}; }

inline Tiles& with(int tile) {
  if (tiles().rows[tile] == 0 || tiles().row_bytes[tile] == 0) __builtin_trap();
  return tiles();
}

template <int To>
inline void tile_zero() {
  memset(with(To).at[To], 0, sizeof(float[16][16]));
}
template <int To>
inline void tile_load(const void* from, int64_t stride) {
  tile_zero<To>();
  Tiles& t = tiles();
  for (int i = 0; i < t.rows[To]; ++i) memcpy(t.at[To][i], static_cast<const char*>(from) + i * stride, t.row_bytes[To]);
}
template <int From>
inline void tile_store(void* to, int64_t stride) {
  Tiles& t = with(From);
  for (int i = 0; i < t.rows[From]; ++i) memcpy(static_cast<char*>(to) + i * stride, t.at[From][i], t.row_bytes[From]);
}

// TDPBF16PS: even products and odd products of a pair in sums of their own would differ in rounding only.
template <int Sum, int A, int B>
inline void tile_dot() {
  Tiles& t = with(Sum);
  with(A), with(B);
  const int pairs = t.row_bytes[A] / 4;
  if (t.rows[A] != t.rows[Sum] || t.row_bytes[B] != t.row_bytes[Sum] || t.rows[B] != pairs) __builtin_trap();
  for (int i = 0; i < t.rows[Sum]; ++i)
    for (int k = 0; k < pairs; ++k) {
      uint16_t x[2], y[2];
      memcpy(x, &t.at[A][i][k], 4);
      for (int j = 0; j < t.row_bytes[Sum] / 4; ++j) {
        memcpy(y, &t.at[B][k][j], 4);
        float& sum = t.at[Sum][i][j];
        sum = flushed(__builtin_fmaf(from_bf16(x[0]), from_bf16(y[0]), flushed(sum)));
        sum = flushed(__builtin_fmaf(from_bf16(x[1]), from_bf16(y[1]), sum));
      }
    }
}

// TDPBUSD: unsigned bytes of A, signed ones of B, int32 sums.
template <int Sum, int A, int B>
inline void tile_dot_bytes() {
  Tiles& t = with(Sum);
  with(A), with(B);
  const int quads = t.row_bytes[A] / 4;
  if (t.rows[A] != t.rows[Sum] || t.row_bytes[B] != t.row_bytes[Sum] || t.rows[B] != quads) __builtin_trap();
  for (int i = 0; i < t.rows[Sum]; ++i)
    for (int k = 0; k < quads; ++k) {
      uint8_t x[4];
      int8_t y[4];
      memcpy(x, &t.at[A][i][k], 4);
      for (int j = 0; j < t.row_bytes[Sum] / 4; ++j) {
        memcpy(y, &t.at[B][k][j], 4);
        int32_t sum;
        memcpy(&sum, &t.at[Sum][i][j], 4);
        for (int b = 0; b < 4; ++b) sum += x[b] * y[b];
        memcpy(&t.at[Sum][i][j], &sum, 4);
      }
    }
}

}  // namespace emulated
}  // namespace
