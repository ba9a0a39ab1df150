// Rows times a rotation, for `*.simd.cpp` files: out[r, d] = sum_e rows[r, e] rot[e, d], kRows rows at a time with the
// sums in registers.
#pragma once

#include "common/pair_tile.h"

namespace m3 {
namespace M3_LEVEL {
namespace {

constexpr int kRows = 4;
constexpr int kMostColumns = kLanes == 16 ? 5 : 2;  // vectors of sums per row: 20 of 32 registers, 8 of 16

// ---- float ---------------------------------------------------------------------------------------------------------

// Columns [d, d + kVecs * kLanes) of kRows rows, of which the first `count` are stored.
template <int kVecs, class Out>
inline void rotate_columns(const float* rot, int64_t dim, const float* rows, int64_t pitch, int64_t count, int64_t d,
                           Out* out) {
  F32 sum[kRows][kVecs] = {};
  for (int64_t e = 0; e < dim; ++e) {
    F32 r[kVecs];
#pragma GCC unroll 8
    for (int i = 0; i < kVecs; ++i) r[i] = load(rot + e * dim + d + i * kLanes);
#pragma GCC unroll 8
    for (int row = 0; row < kRows; ++row) {
      const F32 x = splat(rows[row * pitch + e]);
#pragma GCC unroll 8
      for (int i = 0; i < kVecs; ++i) sum[row][i] += x * r[i];
    }
  }
#pragma GCC unroll 8
  for (int row = 0; row < kRows; ++row) {
    if (row >= count) break;
#pragma GCC unroll 8
    for (int i = 0; i < kVecs; ++i) store(out + row * dim + d + i * kLanes, sum[row][i]);
  }
}

template <class Out>
void rotate(const float* rot, int64_t dim, const float* rows, int64_t pitch, int64_t count, Out* out) {
  int64_t d = 0;
  for (; d + kMostColumns * kLanes <= dim; d += kMostColumns * kLanes)
    rotate_columns<kMostColumns>(rot, dim, rows, pitch, count, d, out);
  for (; d + kLanes <= dim; d += kLanes) rotate_columns<1>(rot, dim, rows, pitch, count, d, out);
  if (d < dim && dim >= kLanes) {  // the last vector again, overlapping: the same values
    rotate_columns<1>(rot, dim, rows, pitch, count, dim - kLanes, out);
    return;
  }
  for (; d < dim; ++d)
    for (int64_t row = 0; row < count; ++row) {
      float sum = 0.f;
      for (int64_t e = 0; e < dim; ++e) sum += rows[row * pitch + e] * rot[e * dim + d];
      from_float(sum, out + row * dim + d);
    }
}

// ---- pairs of bf16 ---------------------------------------------------------------------------------------------------

constexpr int kPairDim = 128;  // rotations up to this size are packed on the stack

// pairs[e / 2, d] = (rot[e, d], rot[e + 1, d]) rounded to bf16. dim is a multiple of kLanes.
inline void pack_rotation(const float* rot, int64_t dim, uint32_t* pairs) {
  for (int64_t e = 0; e < dim; e += 2)
    for (int64_t d = 0; d < dim; d += kLanes) {
      const U32 both = make_pairs(load(rot + e * dim + d), load(rot + (e + 1) * dim + d));
      memcpy(pairs + e / 2 * dim + d, &both, sizeof both);
    }
}

// As rotate_columns, rows and rotation in pairs.
template <int kVecs>
inline void rotate_pair_columns(const uint32_t* rot, int64_t dim, const uint32_t* rows, int64_t count, int64_t d,
                                BF16* out) {
  F32 sum[kRows][kVecs] = {};
  for (int64_t e = 0; e < dim / 2; ++e) {
    U32 r[kVecs];
#pragma GCC unroll 8
    for (int i = 0; i < kVecs; ++i) r[i] = load_pairs(rot + e * dim + d + i * kLanes);
#pragma GCC unroll 8
    for (int row = 0; row < kRows; ++row) {
      const U32 x = splat_pair(rows[row * (dim / 2) + e]);
#pragma GCC unroll 8
      for (int i = 0; i < kVecs; ++i) sum[row][i] = dot_pairs(sum[row][i], x, r[i]);
    }
  }
#pragma GCC unroll 8
  for (int row = 0; row < kRows; ++row) {
    if (row >= count) break;
#pragma GCC unroll 8
    for (int i = 0; i < kVecs; ++i) store(out + row * dim + d + i * kLanes, sum[row][i]);
  }
}

// dim is a multiple of kLanes.
inline void rotate_pairs(const uint32_t* rot, int64_t dim, const uint32_t* rows, int64_t count, BF16* out) {
  int64_t d = 0;
  for (; d + kMostColumns * kLanes <= dim; d += kMostColumns * kLanes)
    rotate_pair_columns<kMostColumns>(rot, dim, rows, count, d, out);
  switch ((dim - d) / kLanes) {
    case 4: return rotate_pair_columns<4>(rot, dim, rows, count, d, out);
    case 3: return rotate_pair_columns<3>(rot, dim, rows, count, d, out);
    case 2: return rotate_pair_columns<2>(rot, dim, rows, count, d, out);
    case 1: return rotate_pair_columns<1>(rot, dim, rows, count, d, out);
    default: return;
  }
}

}  // namespace
}  // namespace M3_LEVEL
}  // namespace m3
