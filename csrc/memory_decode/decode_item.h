// The work items of memory_decode and memory_decode_coded: a sequence x a KV head x a block of its new rows (all of
// them, but for large groups). They differ in how records are read.
//
// Where the cache keeps the heads of a token side by side, neighbouring items of one sequence are worked on together:
// their rows are then one stretch of memory, read at its full rate, while one head's rows are short pieces far apart.
// An item's result does not depend on its neighbours.
#pragma once

#include "common/attention_columns.h"
#include "common/row_blocks.h"
#include "common/simd.h"
#include "m3/memory_decode.h"

namespace m3 {
namespace M3_LEVEL {
namespace {

// One cache (keys or values) of a sequence as seen by a run of heads.
template <class T>
struct CacheSide {
  const T* data;  // of the run's first head
  const int64_t* stride;
  const int32_t* pages;  // of the sequence; null: dense
  int64_t page, sequence;

  const T* row(int64_t at) const {
    return pages ? data + pages[at / page] * stride[0] + at % page * stride[1]
                 : data + sequence * stride[0] + at * stride[1];
  }
};

// A third of a first-level cache of 48 KB: room for what is worked on, for what comes next and for the queries.
constexpr int kStageBytes = 16384;

// Memory on its way to the first-level cache, or (Far) to the second, while something else is worked on: rows of `span`
// bytes.
template <bool Far>
struct Ahead {
  static constexpr bool kFetches = true;
  static constexpr int kLocality = Far ? 2 : 3;
  const char* row = nullptr;
  int64_t pitch = 0;
  int span = 0, at = 0, left = 0;

  template <class T>
  static Ahead rows(const T* first, int64_t stride, int64_t width, int count) {
    Ahead made{reinterpret_cast<const char*>(first), stride * static_cast<int64_t>(sizeof(T)),
               static_cast<int>(width * sizeof(T)), 0, count};
    if (made.pitch == made.span) made.span *= count, made.left = 1;  // one stretch
    return made;
  }

  // The next n lines.
  void operator()(int n) {
    if (left == 0) return;
    open_page(64 * n);
    if (at + 64 * n <= span) {
#pragma GCC unroll 16
      for (int i = 0; i < n; ++i) __builtin_prefetch(row + at + 64 * i, 0, kLocality);
      advance(n);
    } else {
      by_line(n);
    }
  }

  // The same, but where they are consecutive, the caller is left to fetch them; else it gets `other`.
  const char* take(int n, const void* other) {
    if (left == 0 || at + 64 * n > span) {
      by_line(n);
      return static_cast<const char*>(other);
    }
    open_page(64 * n);
    const char* const first = row + at;
    advance(n);
    return first;
  }

 private:
  // Apart from the loops of products, whose registers it would take.
  __attribute__((noinline)) void by_line(int n) {
    for (; n > 0 && left > 0; --n) {
      __builtin_prefetch(row + at, 0, kLocality);
      at += 64;
      if (at >= span) next_row();
    }
  }

  void advance(int n) {
    at += 64 * n;
    if (at == span) next_row();
  }

  void next_row() { at = 0, row += pitch, --left; }

  // A line of a page further on, once per page: its address is translated by the time when lines are fetched from it.
  // Prefetches of many lines of an untranslated page wait for the walk through the page tables and hold up others.
  void open_page(int bytes) const {
    constexpr int kPage = 4096;
    if (static_cast<int>(reinterpret_cast<uintptr_t>(row + at) % kPage) < bytes)
      __builtin_prefetch(row + at + kStageBytes, 0, 2);
  }
};

// Rows of cache that are worked on at a time. A power of two no larger than the smallest page, or more: no stage
// crosses a page. No fewer than scores are summed of at a time.
template <class T>
inline int stage_rows(int64_t bytes_per_row) {
  constexpr int kFewest = kByPairs<T> || kLanes < 8 ? 8 : kLanes;
  int rows = kBlock;
  while (rows > kFewest && rows * bytes_per_row > kStageBytes) rows /= 2;
  return rows;
}

// Takes the visible cache rows of sequence b into the tile: `heads` KV heads from `head` on, `rows` x `group` vectors
// each; the block's first row sees `limit` cache rows. Keys of up to kBlock rows stage by stage, then their values; at
// every stage the next one is on its way.
template <class T, bool Far>
void consume_cache(const M3MemoryDecodeParams& p, int64_t b, int64_t head, int heads, int64_t limit, int rows,
                   int group, QueryTile& tile) {
  const int32_t* pages = p.block_table ? p.block_table + b * p.max_pages : nullptr;
  const CacheSide<T> k{static_cast<const T*>(p.k_cache) + head * p.k_stride[2], p.k_stride, pages, p.page, b};
  const CacheSide<T> v{static_cast<const T*>(p.v_cache) + head * p.v_stride[2], p.v_stride, pages, p.page, b};
  const int64_t keys = limit + rows - 1, k_width = (heads - 1) * p.k_stride[2] + tile.dim,
                v_width = (heads - 1) * p.v_stride[2] + tile.dim;
  int step = stage_rows<T>(sizeof(T) * (k_width > v_width ? k_width : v_width));
  if (pages && step > p.page) step = static_cast<int>(p.page);
  const int m = rows * group;
  int seen[kTileRows];

  const auto ahead_of = [&](const CacheSide<T>& side, int64_t width, int64_t at, int64_t end) {
    const int n = end - at < step ? static_cast<int>(end - at) : step;
    return n > 0 ? Ahead<Far>::rows(side.row(at), side.stride[1], width, n) : Ahead<Far>{};
  };
  for (int64_t at = 0; at < keys; at += kBlock) {
    const int count = static_cast<int>(keys - at < kBlock ? keys - at : kBlock);
    const int64_t end = at + count;
    for (int s = 0; s < count; s += step) {
      const int n = count - s < step ? count - s : step;
      Ahead<Far> next = s + n < count ? ahead_of(k, k_width, at + s + n, end) : ahead_of(v, v_width, at, end);
      const T* first = k.row(at + s);
      for (int h = 0; h < heads; ++h)
        few_scores<T>(tile, h * m, m, [&](int j) { return first + h * p.k_stride[2] + j * p.k_stride[1]; }, n, s,
                      next);
    }
    const int* visible = causal(limit, rows, group, at, count, seen);
    for (int h = 0; h < heads; ++h) mask_scores(nullptr, count, visible, m, tile.p + h * m * kBlock);
    absorb<kByPairs<T>>(tile, 0, tile.m, count);
    for (int s = 0; s < count; s += step) {
      const int n = count - s < step ? count - s : step;
      Ahead<Far> next = s + n < count ? ahead_of(v, v_width, at + s + n, end) : ahead_of(k, k_width, end, keys);
      const T* first = v.row(at + s);
      for (int h = 0; h < heads; ++h)
        few_values<T>(tile, h * m, m, [&](int j) { return first + h * p.v_stride[2] + j * p.v_stride[1]; }, n, s,
                      next);
    }
  }
}

// The same for one head with many query vectors, block by block: take(block, seen).
template <class T, class Take>
void for_each_cache_block(const M3MemoryDecodeParams& p, int64_t b, int64_t head, int64_t limit, int rows, int group,
                          const Take& take) {
  const T* k = static_cast<const T*>(p.k_cache) + head * p.k_stride[2];
  const T* v = static_cast<const T*>(p.v_cache) + head * p.v_stride[2];
  KeyBlock<T> block;
  int seen[kTileRows];
  const int64_t keys = limit + rows - 1;
  for (int64_t at = 0; at < keys;) {
    block.clear();
    const int64_t first = at;
    while (at < keys && block.room() > 0) {
      // A stretch of rows at equal distances: to the end of the page, or of the sequence.
      const int64_t page = p.block_table ? p.block_table[b * p.max_pages + at / p.page] : b;
      const int64_t offset = p.block_table ? at % p.page : at, stretch = p.block_table ? p.page - offset : keys - at;
      int64_t n = keys - at < stretch ? keys - at : stretch;
      if (n > block.room()) n = block.room();
      block.append(k + page * p.k_stride[0] + offset * p.k_stride[1], p.k_stride[1],
                   v + page * p.v_stride[0] + offset * p.v_stride[1], p.v_stride[1], static_cast<int>(n));
      at += n;
    }
    take(block, causal(limit, rows, group, first, block.count, seen));
  }
}

#if defined(__AMX_BF16__)
// Many query vectors on tile registers: all of an item. row: its first.
__attribute__((noinline)) inline void decode_columns(const M3MemoryDecodeParams& p, int64_t b, int64_t row,
                                                     int64_t head, int64_t limit, int rows, int group) {
  TileRegisters tiles;
  QueryColumns tile;
  KeyBlock<BF16> block;
  const BF16* q = static_cast<const BF16*>(p.q) + row * p.q_stride[0] + head * group * p.q_stride[1];
  tile.begin(q, p.q_stride, p.heads, row, head * group, rows, group, static_cast<int>(p.dim), p.scale, p.mass,
             p.memory.refs);
  const auto take = [&](const KeyBlock<BF16>& keys, const int* seen) { tile.consume(tiles, keys, seen); };
  const int64_t from = record_head(p.memory, head);
  if (from >= 0)
    for_each_record_block(p.memory, b, from, block, [&](const KeyBlock<BF16>& keys) { take(keys, nullptr); });
  for_each_cache_block<BF16>(p, b, head, limit, rows, group, take);
  tile.finish(static_cast<BF16*>(p.out), p.lse);
}
#endif

// How many of `heads` heads with m vectors each are worked on together.
inline int heads_together(const M3MemoryDecodeParams& p, int64_t heads, int m) {
  const bool adjacent = p.k_stride[2] < p.k_stride[1] && p.v_stride[2] < p.v_stride[1];
  if (m > kFewRows || !adjacent) return 1;
  const int most = kTileRows / m;
  return heads < most ? static_cast<int>(heads) : most;
}

// read(tile, heads, m, b, head) takes the records of sequence b into the tile: m vectors for each of `heads` KV heads
// from `head` on. It leaves their queries as they were. Mixed: records come in another type than T.
template <class T, bool Mixed, class Read>
void for_each_decode_item(const M3MemoryDecodeParams& p, const RowBlocks& blocks, int64_t begin, int64_t end,
                          const Read& read) {
  const int group = static_cast<int>(p.heads / p.kv_heads), dim = static_cast<int>(p.dim);
  const bool far = far_is_faster();
  QueryTile tile;
  for (int64_t item = begin; item < end;) {
    const int64_t head = item % p.kv_heads, place = item / p.kv_heads, b = place / blocks.count;
    const int64_t row = p.cu_q[b] + place % blocks.count * blocks.rows, left = p.cu_q[b + 1] - row;
    const int64_t others = p.kv_heads - head < end - item ? p.kv_heads - head : end - item;
    if (left <= 0) {
      item += others;
      continue;
    }
    const int rows = static_cast<int>(left < blocks.rows ? left : blocks.rows), m = rows * group;
    const int64_t limit = p.kv_len[b] - left + 1;
#if defined(__AMX_BF16__)
    if constexpr (kTiled<T> && !Mixed)
      if (m > kFewRows) {
        decode_columns(p, b, row, head, limit, rows, group);
        ++item;
        continue;
      }
#endif
    const int heads = heads_together(p, others, m);
    tile.begin(heads * m, dim, p.scale, p.memory.refs);
    for (int h = 0; h < heads; ++h) {
      const T* q = static_cast<const T*>(p.q) + row * p.q_stride[0] + (head + h) * group * p.q_stride[1];
      load_rows<T, Mixed>(q, p.q_stride[0], p.q_stride[1], rows, group, h * m, tile);
      begin_mass(tile, h * m, p.mass, p.heads, row, (head + h) * group, rows, group);
    }
    read(tile, heads, m, b, head);
    if (m <= kFewRows)
      far ? consume_cache<T, true>(p, b, head, heads, limit, rows, group, tile)
          : consume_cache<T, false>(p, b, head, heads, limit, rows, group, tile);
    else
      for_each_cache_block<T>(p, b, head, limit, rows, group, [&](const KeyBlock<T>& block, const int* seen) {
        consume(tile, 0, tile.m, block, seen);
      });
    for (int h = 0; h < heads; ++h)
      finish(tile, h * m, static_cast<T*>(p.out), p.lse, p.heads, row, (head + h) * group, rows, group);
    item += heads;
  }
}

}  // namespace
}  // namespace M3_LEVEL
}  // namespace m3
