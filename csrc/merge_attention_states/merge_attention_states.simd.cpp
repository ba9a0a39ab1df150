// One row per (token, head): out = wa * out_a + wb * out_b with wa = exp(lse_a - m) / (exp(lse_a - m) + exp(lse_b - m)).
#include "m3/merge_attention_states.h"

#include "common/vec.h"

namespace m3 {
namespace M3_LEVEL {
namespace {

template <class T>
void merge_rows(const M3MergeAttentionStatesParams& p, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const T* a = static_cast<const T*>(p.out_a) + row * p.dim;
    const T* b = static_cast<const T*>(p.out_b) + row * p.dim;
    T* out = static_cast<T*>(p.out) + row * p.dim;
    const float la = p.lse_a[row], lb = p.lse_b[row], top = la > lb ? la : lb;
    float wa = 0.f, wb = 0.f;
    p.lse[row] = top;
    if (top != -kInf) {
      wa = __builtin_expf(la - top), wb = __builtin_expf(lb - top);
      const float total = wa + wb;
      p.lse[row] = top + __builtin_logf(total);
      wa /= total, wb /= total;
    }
    // A side that saw nothing has weight 0 and is not read: its rows may hold anything.
    int64_t d = 0;
    for (; d + kLanes <= p.dim; d += kLanes) {
      F32 x = {};
      if (wa != 0.f) x += load(a + d) * wa;
      if (wb != 0.f) x += load(b + d) * wb;
      store(out + d, x);
    }
    for (; d < p.dim; ++d) {
      float x = 0.f;
      if (wa != 0.f) x += to_float(a[d]) * wa;
      if (wb != 0.f) x += to_float(b[d]) * wb;
      from_float(x, out + d);
    }
  }
}

}  // namespace

void merge_attention_states(const M3MergeAttentionStatesParams& p, int64_t begin, int64_t end) {
  with_dtype(p.dtype, [&](auto tag) { merge_rows<decltype(tag)>(p, begin, end); });
}

}  // namespace M3_LEVEL
}  // namespace m3
