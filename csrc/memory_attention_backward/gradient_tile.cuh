// What the kernels of memory_attention_backward share: products of score-shaped tiles, and what p and its gradient are.
#pragma once

#include "m3/memory_attention.h"
#include "memory_attention/token_tiles.cuh"

namespace m3::gpu {

// Between the kernels of one call.
struct GradientWorkspace {
  float* correction;   // [Tq, Hq]: grad_lse - grad_out . out
  float* record_k;     // [C, Hkv, R K, D]: what each chunk adds to the gradients of its tokens; of tokens that exist
  float* record_v;     // same
  float* record_bias;  // [C, Hkv, R K]
  int32_t* next;       // [C R]: the next place in mem_slot with the same slot, -1: none
  int32_t* first;      // [C R]: whether no place before has the same slot
};

// Rows that saw nothing get infinity, with which all their probabilities become 0.
M3_DEVICE float base2_of(float lse) { return lse == kMinusInfinity ? -kMinusInfinity : lse * kLog2e; }

// exp2(score - lse), and the gradient of the score; 0 where p is, whatever `dp` and `correction` hold.
M3_DEVICE float probability(float score, float lse) { return exp2_fast(score - lse); }
M3_DEVICE float score_gradient(float p, float dp, float correction) { return p > 0.0f ? p * (dp + correction) : 0.0f; }

// s += x y^T: x held in registers, y 16 rows in shared memory, `offset` elements behind `tiles`.
template <class T, int D>
M3_DEVICE void add_scores(const QueryFragments<T, D>& x, const T* tiles, int offset, TileScores& s) {
  const int at = offset + tile_at<D>(lane_index() % 8 + lane_index() / 16 * 8, lane_index() / 8 % 2);
  M3_UNROLL
  for (int k = 0; k < D / 16; ++k) {
    uint32_t b[4];
    load_matrices(b, tiles + fragment_at<D>(at, k));
    mma<T>(s[0], x.a[k], b[0], b[1]);
    mma<T>(s[1], x.a[k], b[2], b[3]);
  }
}
// The same with x in shared memory too.
template <class T, int D>
M3_DEVICE void add_scores(const T* x, const T* tiles, int offset, TileScores& s) {
  const int at = offset + tile_at<D>(lane_index() % 8 + lane_index() / 16 * 8, lane_index() / 8 % 2);
  const int lane = lane_anew(), from = tile_at<D>(lane % 16, lane / 16);
  M3_UNROLL
  for (int k = 0; k < D / 16; ++k) {
    uint32_t a[4], b[4];
    load_matrices(a, x + fragment_at<D>(from, k));
    load_matrices(b, tiles + fragment_at<D>(at, k));
    mma<T>(s[0], a, b[0], b[1]);
    mma<T>(s[1], a, b[2], b[3]);
  }
}

// acc += x rows: x [16, 16] in mma's layout of results, rows [16, D] in shared memory.
template <class T, int D>
M3_DEVICE void add_product(const TileScores& x, const T* tiles, int offset, float (&acc)[D / 8][4]) {
  const uint32_t a[4] = {pack<T>(x[0][0], x[0][1]), pack<T>(x[0][2], x[0][3]), pack<T>(x[1][0], x[1][1]),
                         pack<T>(x[1][2], x[1][3])};
  const int at = offset + tile_at<D>(lane_index() % 16, lane_index() / 16);
  M3_UNROLL
  for (int n = 0; n < D / 16; ++n) {
    uint32_t b[4];
    load_matrices_transposed(b, tiles + fragment_at<D>(at, n));
    mma<T>(acc[2 * n], a, b[0], b[1]);
    mma<T>(acc[2 * n + 1], a, b[2], b[3]);
  }
}

template <int D>
M3_DEVICE void scale_rows(float (&acc)[D / 8][4], float scale) {
  M3_UNROLL
  for (int n = 0; n < D / 8; ++n) {
    M3_UNROLL
    for (int i = 0; i < 4; ++i) acc[n][i] *= scale;
  }
}

}  // namespace m3::gpu
