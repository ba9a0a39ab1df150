// The query vectors of one KV head in the order of their rows, a row's heads together, for `*.simd.cpp` files.
#pragma once

#include <stdint.h>

#include "m3/select_tokens.h"

namespace m3 {
namespace M3_LEVEL {
namespace {

// Steps through them without a division; past the end it stays at the last one.
template <class T>
struct Queries {
  const T* at;
  int64_t left, row;

  // q: head 0 of the group, row 0; rows p.start..length.
  Queries(const M3SelectTokensParams& p, const T* q, int64_t length)
      : at(q + p.start * p.q_stride[1]), row(p.start), group_(p.q_heads / p.kv_heads), in_row_(group_),
        to_head_(p.q_stride[2]), to_row_(p.q_stride[1] - (group_ - 1) * p.q_stride[2]) {
    left = (length - p.start) * group_;
  }

  const T* take() {
    const T* found = at;
    if (--left <= 0) return found;
    if (--in_row_ > 0)
      at += to_head_;
    else
      at += to_row_, in_row_ = group_, ++row;
    return found;
  }

 private:
  int64_t group_, in_row_, to_head_, to_row_;
};

}  // namespace
}  // namespace M3_LEVEL
}  // namespace m3
