// Rows times a rotation, for `*.simd.cpp` files: out[r, d] = sum_e rows[r, e] rot[e, d], kRows rows at a time with the
// sums in registers. Rows and rotation are both float, or both pairs of bf16 (common/pair_tile.h).
#pragma once

#include "common/pair_tile.h"

namespace m3 {
namespace M3_LEVEL {
namespace {

constexpr int kRows = kLanes == 16 ? 4 : 6;
constexpr int kMostColumns = kLanes == 16 ? 5 : 2;  // vectors of sums per row: 20 of 32 registers, 12 of 16

inline F32 multiply_add(F32 sum, float x, F32 r) { return sum + x * r; }
inline F32 multiply_add(F32 sum, uint32_t x, U32 r) { return dot_pairs(sum, splat_pair(x), r); }
inline F32 load_rotation(const float* p) { return load(p); }
inline U32 load_rotation(const uint32_t* p) { return load_pairs(p); }

// sum[i] += (element i * pitch of x) * (vectors of r)
template <int kVecs, class E>
inline __attribute__((always_inline)) void multiply(F32 (&sum)[kRows][kVecs], const E* x, int64_t pitch, const E* r) {
  decltype(load_rotation(r)) line[kVecs];
#pragma GCC unroll 8
  for (int i = 0; i < kVecs; ++i) line[i] = load_rotation(r + i * kLanes);
#pragma GCC unroll 8
  for (int row = 0; row < kRows; ++row)
#pragma GCC unroll 8
    for (int i = 0; i < kVecs; ++i) sum[row][i] = multiply_add(sum[row][i], x[row * pitch], line[i]);
}

template <int kVecs, class Out>
inline __attribute__((always_inline)) void store_rows(F32 (&sum)[kRows][kVecs], int64_t count, int64_t dim, Out* out) {
#pragma GCC unroll 8
  for (int row = 0; row < kRows; ++row) {
    if (row >= count) break;
#pragma GCC unroll 8
    for (int i = 0; i < kVecs; ++i) store(out + row * dim + i * kLanes, sum[row][i]);
  }
}

// Columns [d, d + kVecs * kLanes) of kRows rows of `depth` elements (dim, or dim / 2 pairs); `count` are stored.
template <int kVecs, class E, class Out>
inline void rotate_columns(const E* rot, int64_t dim, int64_t depth, const E* rows, int64_t count, int64_t d,
                           Out* out) {
  F32 sum[kRows][kVecs] = {};
  for (int64_t e = 0; e < depth; ++e) multiply(sum, rows + e, depth, rot + e * dim + d);
  store_rows(sum, count, dim, out + d);
}

template <class E, class Out>
void rotate(const E* rot, int64_t dim, int64_t depth, const E* rows, int64_t count, Out* out) {
  int64_t d = 0;
  for (; d + kMostColumns * kLanes <= dim; d += kMostColumns * kLanes)
    rotate_columns<kMostColumns>(rot, dim, depth, rows, count, d, out);
  for (; d + 2 * kLanes <= dim; d += 2 * kLanes) rotate_columns<2>(rot, dim, depth, rows, count, d, out);
  for (; d + kLanes <= dim; d += kLanes) rotate_columns<1>(rot, dim, depth, rows, count, d, out);
  if (d == dim) return;
  if (dim >= kLanes) {  // the last vector again, overlapping: the same values
    rotate_columns<1>(rot, dim, depth, rows, count, dim - kLanes, out);
    return;
  }
  if constexpr (__is_same(E, float))  // D = 8 in vectors of 16
    for (; d < dim; ++d)
      for (int64_t row = 0; row < count; ++row) {
        float sum = 0.f;
        for (int64_t e = 0; e < depth; ++e) sum += rows[row * depth + e] * rot[e * dim + d];
        from_float(sum, out + row * dim + d);
      }
}

// pairs[e / 2, d] = (rot[e, d], rot[e + 1, d]) rounded to bf16. dim is a multiple of kLanes.
inline void pack_rotation(const float* rot, int64_t dim, uint32_t* pairs) {
  for (int64_t e = 0; e < dim; e += 2)
    for (int64_t d = 0; d < dim; d += kLanes) {
      const U32 both = make_pairs(load(rot + e * dim + d), load(rot + (e + 1) * dim + d));
      memcpy(pairs + e / 2 * dim + d, &both, sizeof both);
    }
}

}  // namespace
}  // namespace M3_LEVEL
}  // namespace m3
