// One (reference, KV head): the keys are transposed once to [D, columns] float32, so that lanes run over keys. Queries
// come in blocks of six: their scores against all keys (12 accumulators), then a softmax per row added to the column
// sums (received, causal), or a running log-sum-exp per column (exp). Last, the K best columns.
#include "m3/select_tokens.h"

#include "common/vec.h"
#include "select_tokens/layout.h"

namespace m3 {
namespace M3_LEVEL {
namespace {

constexpr float kLowest = -3.4028234663852886e38f;

// keys[d][c] = k[base + c][d]; columns past `used` are 0.
template <class T>
void transpose_keys(const T* k, int64_t stride, int64_t dim, int64_t used, int64_t columns, float* keys) {
  for (int64_t d = 0; d < dim; ++d)
    for (int64_t c = used; c < columns; ++c) keys[d * columns + c] = 0.f;
  for (int64_t d = 0; d < dim; d += 8)  // eight lines at a time stay in L1 while a row's elements are spread over them
    for (int64_t c = 0; c < used; ++c)
      for (int64_t e = 0; e < 8; ++e) keys[(d + e) * columns + c] = to_float(k[c * stride + d + e]);
}

// query[r][d] = scale * q[row + r][d]; rows past `count` are 0.
template <class T>
void scale_queries(const T* q, int64_t stride, int64_t dim, int64_t count, float scale, float* query) {
  for (int64_t r = 0; r < kSelectRows; ++r)
    for (int64_t d = 0; d < dim; ++d) query[r * dim + d] = r < count ? scale * to_float(q[r * stride + d]) : 0.f;
}

// score[r][c] for columns [0, end), end a multiple of 2 * kLanes.
void score_block(const float* query, const float* keys, int64_t dim, int64_t columns, int64_t end, float* score) {
  for (int64_t c = 0; c < end; c += 2 * kLanes) {
    F32 sum[kSelectRows][2] = {};
    for (int64_t d = 0; d < dim; ++d) {
      const F32 k0 = load(keys + d * columns + c), k1 = load(keys + d * columns + c + kLanes);
      for (int64_t r = 0; r < kSelectRows; ++r) {
        sum[r][0] += query[r * dim + d] * k0;
        sum[r][1] += query[r * dim + d] * k1;
      }
    }
    for (int64_t r = 0; r < kSelectRows; ++r) {
      store(score + r * columns + c, sum[r][0]);
      store(score + r * columns + c + kLanes, sum[r][1]);
    }
  }
}

// score[0..seen) becomes exp(score - max), the rest of [0, end) 0; returns 1 / their sum.
float exponentials(float* score, int64_t seen, int64_t end) {
  for (int64_t c = seen; c < end; ++c) score[c] = -kInf;
  F32 high = splat(-kInf);
  for (int64_t c = 0; c < end; c += kLanes) high = max(high, load(score + c));
  const float top = max(high);
  F32 total = {};
  for (int64_t c = 0; c < end; c += kLanes) {
    const F32 e = exp(load(score + c) - top);
    store(score + c, e);
    total += e;
  }
  return 1.f / sum(total);
}

// weight += sum of the block's softmax rows; row r sees the first seen + r * step columns.
void add_softmax(float* score, int64_t columns, int64_t end, int64_t count, int64_t seen, int64_t step, float* weight) {
  float share[kSelectRows] = {};
  for (int64_t r = 0; r < count; ++r) share[r] = exponentials(score + r * columns, seen + r * step, end);
  for (int64_t c = 0; c < end; c += kLanes) {
    F32 block = {};  // the block first: fewer roundings of the long sum
    for (int64_t r = 0; r < count; ++r) block += load(score + r * columns + c) * share[r];
    store(weight + c, load(weight + c) + block);
  }
}

// Running log-sum-exp per column: highest[c] and weight[c] = sum exp(score - highest).
void add_exponentials(const float* score, int64_t columns, int64_t end, int64_t count, float* highest, float* weight) {
  for (int64_t c = 0; c < end; c += kLanes) {
    const F32 before = load(highest + c);
    F32 top = before;
    for (int64_t r = 0; r < count; ++r) top = max(top, load(score + r * columns + c));
    F32 total = load(weight + c) * exp(before - top);
    for (int64_t r = 0; r < count; ++r) total += exp(load(score + r * columns + c) - top);
    store(highest + c, top);
    store(weight + c, total);
  }
}

// The `kept` largest of weight[0..count), ties to the lower column, as ascending rows; -1 fills index[0..tokens).
void best_columns(const float* weight, int64_t count, int64_t base, int64_t tokens, int32_t* index) {
  float best[M3_SELECT_MAX_TOKENS];
  const int64_t kept = tokens < count ? tokens : count;
  int64_t held = 0;
  for (int64_t c = 0; c < count; ++c) {
    const float w = weight[c] >= kLowest ? weight[c] : kLowest;  // NaN and -inf rank last, and can still be chosen
    if (held == kept && w <= best[kept - 1]) continue;
    int64_t at = held < kept ? held++ : kept - 1;
    for (; at > 0 && best[at - 1] < w; --at) best[at] = best[at - 1], index[at] = index[at - 1];
    best[at] = w, index[at] = static_cast<int32_t>(base + c);
  }
  for (int64_t i = 1; i < kept; ++i) {
    const int32_t row = index[i];
    int64_t at = i;
    for (; at > 0 && index[at - 1] > row; --at) index[at] = index[at - 1];
    index[at] = row;
  }
  for (int64_t i = kept; i < tokens; ++i) index[i] = -1;
}

template <class T>
void select_head(const M3SelectTokensParams& p, int64_t ref, int64_t head, float* workspace) {
  const SelectLayout at = select_layout(p);
  float* keys = workspace + at.keys;
  float* query = workspace + at.query;
  float* score = workspace + at.score;
  float* weight = workspace + at.weight;
  float* highest = workspace + at.highest;
  int32_t* index = p.index + (ref * p.kv_heads + head) * p.tokens;
  const int64_t length = p.length[ref], group = p.q_heads / p.kv_heads;
  const bool causal = p.rule == M3_SELECT_CAUSAL;
  const int64_t base = causal ? 0 : p.start;  // row of column 0
  const int64_t used = length > p.start ? length - base : 0;
  if (used == 0) {
    for (int64_t i = 0; i < p.tokens; ++i) index[i] = -1;
    return;
  }
  const T* q = static_cast<const T*>(p.q) + ref * p.q_stride[0];
  const T* k = static_cast<const T*>(p.k) + ref * p.k_stride[0] + base * p.k_stride[1] + head * p.k_stride[2];
  const int64_t step = 2 * kLanes, columns = (used + step - 1) / step * step;
  transpose_keys(k, p.k_stride[1], p.dim, used, columns, keys);
  for (int64_t c = 0; c < columns; ++c) weight[c] = 0.f, highest[c] = -kInf;
  for (int64_t g = 0; g < group; ++g) {
    for (int64_t row = p.start; row < length; row += kSelectRows) {
      const int64_t count = length - row < kSelectRows ? length - row : kSelectRows;
      const int64_t seen = causal ? row + count : used;  // by the block's last row
      const int64_t end = (seen + step - 1) / step * step;
      scale_queries(q + row * p.q_stride[1] + (head * group + g) * p.q_stride[2], p.q_stride[1], p.dim, count, p.scale,
                    query);
      score_block(query, keys, p.dim, columns, end, score);
      if (p.rule == M3_SELECT_EXP)
        add_exponentials(score, columns, end, count, highest, weight);
      else
        add_softmax(score, columns, end, count, causal ? row + 1 : used, causal ? 1 : 0, weight);
    }
  }
  if (p.rule == M3_SELECT_EXP)
    for (int64_t c = 0; c < used; ++c) weight[c] = highest[c] + __builtin_logf(weight[c]);
  const int64_t skip = p.start - base;  // columns of a prefix
  best_columns(weight + skip, used - skip, p.start, p.tokens, index);
}

}  // namespace

void select_tokens(const M3SelectTokensParams& p, int64_t ref, int64_t head, float* workspace) {
  with_dtype(p.dtype, [&](auto tag) { select_head<decltype(tag)>(p, ref, head, workspace); });
}

}  // namespace M3_LEVEL
}  // namespace m3
