// Stack tiles of the gradient kernels: a block of query vectors against a block of keys.
#pragma once

#include "common/attention_walk.h"
#include "m3/memory_attention.h"

namespace m3 {
namespace M3_LEVEL {
namespace {

// Keys and values of a block, transposed for the score products.
struct KeyTile {
  alignas(64) float k[kMaxDim * kBlock];  // [dim, kBlock]
  alignas(64) float v[kMaxDim * kBlock];

  template <class T>
  void load(const KeyBlock<T>& block, int dim) {
    pack_columns(block.k, block.count, dim, k, kBlock);
    pack_columns(block.v, block.count, dim, v, kBlock);
  }
};

struct GradTile {
  alignas(64) float q[kTileRows * kMaxDim];  // [m, ld], scaled
  alignas(64) float g[kTileRows * kMaxDim];  // [m, ld], gradient of out
  alignas(64) float p[kTileRows * kBlock];   // probabilities
  alignas(64) float ds[kTileRows * kBlock];  // gradient of the scores
  float lse[kTileRows], correction[kTileRows];
  int m, dim, ld;

  // The query vectors of rows [row, row + rows) of KV head `head`. A row that saw nothing takes no part.
  template <class T>
  void load(const M3MemoryAttentionBackwardParams& params, int64_t row, int64_t head, int rows, int group) {
    const M3MemoryAttentionParams& p = params.forward;
    m = rows * group, dim = static_cast<int>(p.dim), ld = padded(dim);
    const int64_t first = head * group;
    const T* queries = static_cast<const T*>(p.q) + row * p.q_stride[0] + first * p.q_stride[1];
    load_rows(queries, p.q_stride[0], p.q_stride[1], rows, group, dim, p.scale, q);
    for (int i = 0; i < m; ++i) {
      const int64_t at = (row + i / group) * p.heads + first + i % group;
      float* gradient = g + i * ld;
      lse[i] = p.lse[at];
      if (lse[i] == -kInf) {
        memset(gradient, 0, sizeof(float) * ld);
        lse[i] = correction[i] = 0.f;
        continue;
      }
      alignas(64) float out[kMaxDim];
      pack_row(static_cast<const T*>(params.grad_out) + at * dim, dim, 1.f, gradient);
      pack_row(static_cast<const T*>(p.out) + at * dim, dim, 1.f, out);
      F32 total = {};
      for (int d = 0; d < ld; d += kLanes) total += load_vector(gradient + d) * load_vector(out + d);
      correction[i] = params.grad_lse[at] - sum(total);
    }
  }

  // p = exp(s - lse), ds = p (g . v - g . out + grad_lse) against a block of keys.
  template <class T>
  void score(const KeyTile& keys, const KeyBlock<T>& block, const int* seen) {
    const int width = padded(block.count);
    gemm(Strided{q, ld, 1}, Rows<float>{keys.k, kBlock}, m, width, dim, p, kBlock, false);
    gemm(Strided{g, ld, 1}, Rows<float>{keys.v, kBlock}, m, width, dim, ds, kBlock, false);
    mask_scores(block, seen, m, p);
    for (int i = 0; i < m; ++i)
      for (int j = i * kBlock; j < i * kBlock + width; j += kLanes) {
        const F32 weight = exp(load_vector(p + j) - lse[i]);
        store(p + j, weight);
        store(ds + j, weight * (load_vector(ds + j) + correction[i]));
      }
  }

 private:
  static F32 load_vector(const float* x) { return M3_LEVEL::load(x); }
};

// Sums of one block of keys over query blocks.
struct KeyGradient {
  alignas(64) float k[kBlock * kMaxDim];  // [count, ld]
  alignas(64) float v[kBlock * kMaxDim];
  alignas(64) float bias[kBlock];

  void clear(int count, int ld) {
    memset(k, 0, sizeof(float) * count * ld);
    memset(v, 0, sizeof(float) * count * ld);
    memset(bias, 0, sizeof bias);
  }

  void add(const GradTile& tile, int count) {
    gemm(Strided{tile.ds, 1, kBlock}, Rows<float>{tile.q, tile.ld}, count, tile.ld, tile.m, k, tile.ld, true);
    gemm(Strided{tile.p, 1, kBlock}, Rows<float>{tile.g, tile.ld}, count, tile.ld, tile.m, v, tile.ld, true);
    for (int i = 0; i < tile.m; ++i)
      for (int j = 0; j < count; j += kLanes) store(bias + j, load(bias + j) + load(tile.ds + i * kBlock + j));
  }
};

}  // namespace
}  // namespace M3_LEVEL
}  // namespace m3
