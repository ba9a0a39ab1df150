// One (reference, KV head): the keys become columns once, so that lanes run over keys. The query vectors of the group
// come in blocks: their scores against all keys, then a softmax per row added to the column sums (received, causal), or
// a running log-sum-exp per column (exp). Last, the K best columns. Scores are times log2 e: powers are of 2.
#include "m3/select_tokens.h"

#include "common/attention_tile.h"
#include "select_tokens/layout.h"
#include "select_tokens/power.h"
#include "select_tokens/queries.h"
#include "select_tokens/tiled.h"
#include "select_tokens/woven.h"

namespace m3 {
namespace M3_LEVEL {
namespace {

constexpr float kLowest = -3.4028234663852886e38f;
constexpr float kLog2E = 1.4426950408889634f;
constexpr int kRows = kLanes < 12 ? kLanes : 12;  // of a block: full steps of the products
static_assert(kRows <= kSelectRows);

int64_t whole_vectors(int64_t n) { return (n + kLanes - 1) / kLanes * kLanes; }

// keys[d][c]: element (or pair) d of row c; columns from `used` up to the next vector are copies of the last row.
template <class T>
void pack_keys(const T* k, int64_t stride, int dim, int64_t used, int64_t columns, float* keys) {
  const T* rows[kLanes];
  for (int64_t c = 0; c < used; c += kLanes) {
    const int count = static_cast<int>(used - c < kLanes ? used - c : kLanes);
    for (int i = 0; i < count; ++i) rows[i] = k + (c + i) * stride;
    if constexpr (kPaired<T>)
      pack_pair_columns(rows, count, dim, reinterpret_cast<uint32_t*>(keys) + c, columns);
    else
      pack_columns(rows, count, dim, keys + c, columns);
  }
}

// score[r][c] = factor q_r . k_c for columns [0, end), end a multiple of kLanes.
template <class T>
void score_block(const T* const* q, int count, int dim, float factor, const float* keys, int64_t columns, int end,
                 int64_t width, float* query, float* score) {
  if constexpr (kPaired<T>) {
    uint32_t* pairs = reinterpret_cast<uint32_t*>(query);
    for (int r = 0; r < count; ++r) copy_pairs(q[r], dim, pairs + r * width);
    pair_gemm<false>(pairs, width, reinterpret_cast<const uint32_t*>(keys), columns, count, end, pair_padded(dim) / 2,
                     factor, score, columns);
  } else {
    for (int r = 0; r < count; ++r) pack_row(q[r], dim, factor, query + r * width);
    gemm(Strided{query, width, 1}, Rows<float>{keys, columns}, count, end, dim, score, columns, false);
  }
}

// Columns from `seen` up to `end` become -inf.
void hide_columns(float* score, int64_t seen, int64_t end) {
  for (int64_t c = seen / kLanes * kLanes; c < end; c += kLanes) {
    I32 lane;
    for (int i = 0; i < kLanes; ++i) lane[i] = i;
    const I32 visible = lane < static_cast<int32_t>(seen - c);
    store(score + c, select(visible, load(score + c), splat(-kInf)));
  }
}

// weight += sum of the block's softmax rows; row r sees the first seen[r] columns.
void add_softmax(float* score, int64_t columns, int64_t end, int count, const int64_t* seen, float* weight) {
  const Power power;
  F32 part[kLanes];
  for (int r = 0; r < kLanes; ++r) part[r] = F32{};
  for (int r = 0; r < count; ++r) {
    float* row = score + r * columns;
    hide_columns(row, seen[r], end);
    part[r] = load(row);
    for (int64_t c = kLanes; c < end; c += kLanes) part[r] = max(part[r], load(row + c));
  }
  float top[kLanes], share[kLanes];
  store(top, max_each(part));
  for (int r = 0; r < kLanes; ++r) part[r] = splat(1.f);
  for (int r = 0; r < count; ++r) {
    float* row = score + r * columns;
    F32 total = {};
    for (int64_t c = 0; c < end; c += kLanes) {
      const F32 e = power(load(row + c) - top[r]);
      store(row + c, e);
      total += e;
    }
    part[r] = total;
  }
  store(share, 1.f / sum_each(part));
  for (int64_t c = 0; c < end; c += kLanes) {
    F32 block = {};  // the block first: fewer roundings of the long sum
    for (int r = 0; r < count; ++r) block += load(score + r * columns + c) * share[r];
    store(weight + c, load(weight + c) + block);
  }
}

// Running log-sum-exp per column: highest[c] and weight[c] = sum 2^(score - highest).
void add_powers(const float* score, int64_t columns, int64_t end, int count, float* highest, float* weight) {
  const Power power;
  for (int64_t c = 0; c < end; c += kLanes) {
    const F32 before = load(highest + c);
    F32 top = before;
    for (int r = 0; r < count; ++r) top = max(top, load(score + r * columns + c));
    F32 total = load(weight + c) * power(before - top);
    for (int r = 0; r < count; ++r) total += power(load(score + r * columns + c) - top);
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

#if defined(__AVX512BF16__) && !defined(__AMX_BF16__)
// Whether the softmax rows are added by add_woven.
template <class T>
bool weaves(const M3SelectTokensParams& p, int64_t used) {
  return kPaired<T> && p.rule == M3_SELECT_RECEIVED && p.scale > 0.f && p.dim >= 2 * kWovenSteps &&
         (whole_vectors(used) / kLanes) % kWovenTile == 0;
}
#endif

// Asks for the keys of the worker's next task a few rows at a time: they lie too far apart for the hardware to guess.
template <class T>
struct NextKeys {
  const T* k = nullptr;
  int64_t stride, dim, left = 0, each = 0;

  // To be called `parts` times.
  NextKeys(const M3SelectTokensParams& p, int64_t ref, int64_t head, int64_t parts)
      : stride(p.k_stride[1]), dim(p.dim) {
    const int64_t task = ref * p.kv_heads + head + p.workers, next = task / p.kv_heads;
    if (next >= p.refs) return;
    k = static_cast<const T*>(p.k) + next * p.k_stride[0] + task % p.kv_heads * p.k_stride[2];
    left = p.length[next], each = (left + parts - 1) / parts;
  }
  void operator()() {
    for (int64_t i = 0; i < each && left > 0; ++i, --left, k += stride)
      for (int64_t d = 0; d < dim; d += 64 / static_cast<int64_t>(sizeof(T))) __builtin_prefetch(k + d);
  }
};

// All query vectors by blocks of kRows.
template <class T>
void add_blocks(const M3SelectTokensParams& p, Queries<T> queries, const T* k, int64_t used, const SelectLayout& at,
                float* workspace) {
  float *keys = workspace + at.keys, *score = workspace + at.score;
  const int dim = static_cast<int>(p.dim);
  pack_keys(k, p.k_stride[1], dim, used, at.columns, keys);
  while (queries.left > 0) {
    const int count = static_cast<int>(queries.left < kRows ? queries.left : kRows);
    const T* rows[kRows];
    int64_t seen[kRows];
    for (int r = 0; r < count; ++r)
      seen[r] = p.rule == M3_SELECT_CAUSAL ? queries.row + 1 : used, rows[r] = queries.take();
    const int64_t end = whole_vectors(seen[count - 1]);
    score_block(rows, count, dim, p.scale * kLog2E, keys, at.columns, static_cast<int>(end), at.width,
                workspace + at.query, score);
    if (p.rule == M3_SELECT_EXP)
      add_powers(score, at.columns, end, count, workspace + at.highest, workspace + at.weight);
    else
      add_softmax(score, at.columns, end, count, seen, workspace + at.weight);
  }
}

template <class T>
void select_head(const M3SelectTokensParams& p, int64_t ref, int64_t head, float* workspace) {
  int32_t* index = p.index + (ref * p.kv_heads + head) * p.tokens;
  const int64_t length = p.length[ref];
  const int64_t base = p.rule == M3_SELECT_CAUSAL ? 0 : p.start;  // row of column 0
  const int64_t used = length > p.start ? length - base : 0;
  if (used == 0) {
    for (int64_t i = 0; i < p.tokens; ++i) index[i] = -1;
    return;
  }
  const SelectLayout at = select_layout(p);
  float *weight = workspace + at.weight, *highest = workspace + at.highest;
  const T* q = static_cast<const T*>(p.q) + ref * p.q_stride[0] + head * (p.q_heads / p.kv_heads) * p.q_stride[2];
  const T* k = static_cast<const T*>(p.k) + ref * p.k_stride[0] + base * p.k_stride[1] + head * p.k_stride[2];
  for (int64_t c = 0; c < at.columns; ++c) weight[c] = 0.f, highest[c] = -kInf;
  const Queries<T> queries(p, q, length);
#if defined(__AMX_BF16__)
  if constexpr (kTiled<T>)
    add_tiled(p, q, k, length, used, p.scale * kLog2E,
              NextKeys<T>(p, ref, head, (queries.left + kTileSide - 1) / kTileSide), at, workspace);
  else
#elif defined(__AVX512BF16__)
  if (weaves<T>(p, used)) {
    if constexpr (kPaired<T>) {
      uint32_t* pairs = reinterpret_cast<uint32_t*>(workspace + at.keys);
      pack_woven(k, p.k_stride[1], static_cast<int>(p.dim), used, pairs);
      add_woven(queries, NextKeys<T>(p, ref, head, (queries.left + kWovenRows - 1) / kWovenRows),
                static_cast<int>(p.dim), p.scale * kLog2E, pairs, used, workspace + at.score, weight);
    }
  } else
#endif
    add_blocks(p, queries, k, used, at, workspace);
  if (p.rule == M3_SELECT_EXP)
    for (int64_t c = 0; c < used; ++c) weight[c] = highest[c] + __builtin_log2f(weight[c]);
  const int64_t skip = p.start - base;  // columns of a prefix
  best_columns(weight + skip, used - skip, p.start, p.tokens, index);
}

}  // namespace

void select_tokens(const M3SelectTokensParams& p, int64_t ref, int64_t head, float* workspace) {
  with_dtype(p.dtype, [&](auto tag) { select_head<decltype(tag)>(p, ref, head, workspace); });
}

}  // namespace M3_LEVEL
}  // namespace m3
