// Records first, then the cache (decode_item.h).
#include "memory_decode/decode_item.h"

namespace m3 {
namespace M3_LEVEL {
namespace {

// Rows to come, asked for while others are worked on: records are short pieces far apart, which no hardware prefetcher
// follows. Where products of bf16 pairs make short work of them it does not pay, unless nothing lies in a cache.
template <class T>
class RowsAhead {
 public:
  static constexpr bool kFetches = false;

  RowsAhead(const T* const* rows, int64_t offset, int count, int dim)
      : rows_(rows), offset_(offset), left_(kPairDots ? 0 : count), lines_(row_lines<T>(dim)) {}

  // The next n lines.
  void operator()(int n) {
    for (; n > 0 && left_ > 0; --n) {
      __builtin_prefetch(reinterpret_cast<const char*>(*rows_ + offset_) + 64 * line_, 0, 2);
      if (++line_ == lines_) line_ = 0, ++rows_, --left_;
    }
  }
  const char* take(int, const void* other) const { return static_cast<const char*>(other); }

 private:
  const T* const* rows_;
  int64_t offset_;
  int left_, lines_, line_ = 0;
};

// The records of all heads of the tile block by block: one softmax for them, whose vectors would hold the few query
// vectors of one head only.
template <class T>
void consume_records(const M3Records& memory, int64_t b, int64_t head, int heads, int m, QueryTile& tile) {
  KeyBlock<T> blocks[2];
  RecordBlocks left(memory, b);
  bool more = left.next(blocks[0]);
  for (int which = 0; more; which = 1 - which) {
    KeyBlock<T>&now = blocks[which], &next = blocks[1 - which];
    more = left.next(next);
    for (int h = 0; h < heads; ++h) {
      const int64_t from = record_head(memory, head + h), k = from * memory.k_stride[1];
      float* p = tile.p + h * m * kBlock;
      if (from < 0) {
        for (int i = 0; i < m * kBlock; i += kLanes) store(p + i, splat(-kInf));
        continue;
      }
      RowsAhead<T> values(now.v, from * memory.v_stride[1], now.count, tile.dim);
      few_scores<T>(tile, h * m, m, [&](int j) { return now.k[j] + k; }, now.count, 0, values);
      read_bias(memory, from, now);
      mask_scores(now, nullptr, m, p);
    }
    absorb<kByPairs<T>>(tile, 0, heads * m, now.count);
    add_mass(tile, 0, heads * m, now);
    for (int h = 0; h < heads; ++h) {
      const int64_t from = record_head(memory, head + h), v = from * memory.v_stride[1];
      if (from < 0) continue;
      RowsAhead<T> keys(next.k, from * memory.k_stride[1], next.count, tile.dim);
      few_values<T>(tile, h * m, m, [&](int j) { return now.v[j] + v; }, now.count, 0, keys);
    }
  }
}

template <class T>
void attend(const M3MemoryDecodeParams& p, const RowBlocks& blocks, int64_t begin, int64_t end) {
  const auto read = [&](QueryTile& tile, int heads, int m, int64_t b, int64_t head) {
    if (m <= kFewRows) return consume_records<T>(p.memory, b, head, heads, m, tile);
    const int64_t from = record_head(p.memory, head);  // the only head
    KeyBlock<T> block;
    if (from >= 0)
      for_each_record_block(p.memory, b, from, block,
                            [&](const KeyBlock<T>& keys) { consume(tile, 0, m, keys, nullptr); });
  };
  for_each_decode_item<T, false>(p, blocks, begin, end, read);
}

}  // namespace

void memory_decode(const M3MemoryDecodeParams& p, const RowBlocks& blocks, int64_t begin, int64_t end) {
  with_dtype(p.dtype, [&](auto tag) { attend<decltype(tag)>(p, blocks, begin, end); });
}

}  // namespace M3_LEVEL
}  // namespace m3
