// Sixteen rows of bf16 times a rotation on tile registers, for `*.simd.cpp` files, in steps of 32 columns: products go
// on by themselves, so that other work belongs between the steps. A step's sums are stored by the next.
#pragma once

#include "common/tile_gemm.h"
#include "rotate.h"

namespace m3 {
namespace M3_LEVEL {
namespace {

#if defined(__AMX_BF16__)

class TiledRotation {
 public:
  static constexpr int kMostDim = 128, kRows = kTileSide;

  // rot [dim, dim], dim a multiple of 16.
  TiledRotation(const float* rot, int64_t dim) : dim_(dim), depth_(pair_padded(static_cast<int>(dim)) / 2) {
    pack_rotation(rot, dim, rot_);
    memset(rot_ + dim / 2 * dim, 0, sizeof(uint32_t) * (depth_ - dim / 2) * dim);
    registers_.shape(kTileSide, kTileSide);
  }

  // Elements of a row; those from dim on have to be zeros.
  int64_t pitch() const { return 2 * depth_; }
  int64_t steps() const { return (dim_ / kTileSide + 1) / 2; }

  // After step steps(), which only stores, the sums of all rows are there.
  void step(const BF16* rows, int64_t step) { step % 2 ? run<2, 0>(rows, step) : run<0, 2>(rows, step); }

  // Rounds twice as many values at once as `store`, in the same time.
  void store_rows(int64_t count, BF16* out) const {
    const int64_t end = (count < kRows ? count : kRows) * dim_;
    int64_t i = 0;
    for (; i + 2 * kLanes <= end; i += 2 * kLanes) {
      const __m512bh both = _mm512_cvtne2ps_pbh(reinterpret_cast<__m512>(load(sums_ + i + kLanes)),
                                                reinterpret_cast<__m512>(load(sums_ + i)));
      memcpy(out + i, &both, sizeof both);
    }
    if (i < end) store(out + i, load(sums_ + i));
  }

 private:
  template <int Now, int Before>
  void run(const BF16* rows, int64_t step) {
    const int64_t d = 2 * kTileSide * step;
    if (step > 0) {
      const int64_t before = d - 2 * kTileSide;
      tile_store<Before>(sums_ + before, 4 * dim_);
      if (before + kTileSide < dim_) tile_store<Before + 1>(sums_ + before + kTileSide, 4 * dim_);
    }
    if (d >= dim_) return;
    d + kTileSide < dim_ ? multiply<Now, true>(rows, d) : multiply<Now, false>(rows, d);
  }

  template <int Sum, bool Both>
  void multiply(const BF16* rows, int64_t d) {
    tile_zero<Sum>();
    if constexpr (Both) tile_zero<Sum + 1>();
    for (int64_t e = 0; e < depth_; e += kTileSide) {
      const uint32_t* rot = rot_ + e * dim_ + d;
      tile_load<4>(rows + 2 * e, 4 * depth_);
      tile_load<6>(rot, 4 * dim_);
      tile_dot<Sum, 4, 6>();
      if constexpr (Both) {
        tile_load<7>(rot + kTileSide, 4 * dim_);
        tile_dot<Sum + 1, 4, 7>();
      }
    }
  }

  const int64_t dim_, depth_;  // in elements, in pairs
  TileRegisters registers_;
  alignas(64) uint32_t rot_[kMostDim / 2 * kMostDim];
  alignas(64) float sums_[kRows * kMostDim];
};

#endif

}  // namespace
}  // namespace M3_LEVEL
}  // namespace m3
