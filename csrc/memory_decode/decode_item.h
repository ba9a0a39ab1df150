// The work items of memory_decode and memory_decode_coded: a sequence x a KV head x a block of its new rows (all of
// them, but for large groups). They differ in how records are read.
#pragma once

#include "common/attention_walk.h"
#include "common/row_blocks.h"
#include "m3/memory_decode.h"

namespace m3 {
namespace M3_LEVEL {
namespace {

// Takes the visible cache rows of sequence b into the tile; the block's first row sees `limit` of them.
template <class T>
void consume_cache(const M3MemoryDecodeParams& p, int64_t b, int64_t head, int64_t limit, int rows, int group,
                   QueryTile& tile, KeyBlock<T>& block) {
  const T* k = static_cast<const T*>(p.k_cache) + head * p.k_stride[2];
  const T* v = static_cast<const T*>(p.v_cache) + head * p.v_stride[2];
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
    consume(tile, block, causal(limit, rows, group, first, block.count, seen));
  }
}

// read(tile, b, record_head) takes the records of sequence b into the tile; it may use `block`, and leaves tile.q as it
// was.
template <class T, class Read>
void for_each_decode_item(const M3MemoryDecodeParams& p, const RowBlocks& blocks, int64_t begin, int64_t end,
                          KeyBlock<T>& block, const Read& read) {
  const int group = static_cast<int>(p.heads / p.kv_heads), dim = static_cast<int>(p.dim);
  QueryTile tile;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t head = item % p.kv_heads, place = item / p.kv_heads, b = place / blocks.count;
    const int64_t row = p.cu_q[b] + place % blocks.count * blocks.rows, left = p.cu_q[b + 1] - row;
    if (left <= 0) continue;
    const int rows = static_cast<int>(left < blocks.rows ? left : blocks.rows);
    const T* q = static_cast<const T*>(p.q) + row * p.q_stride[0] + head * group * p.q_stride[1];
    tile.begin(rows * group, dim, p.memory.refs);
    load_rows(q, p.q_stride[0], p.q_stride[1], rows, group, dim, p.scale, tile.q);
    begin_mass(tile, p.mass, p.heads, row, head * group, rows, group);
    const int64_t from = record_head(p.memory, head);
    if (from >= 0) read(tile, b, from);
    consume_cache(p, b, head, p.kv_len[b] - left + 1, rows, group, tile, block);
    finish(tile, static_cast<T*>(p.out), p.lse, p.heads, row, head * group, rows, group);
  }
}

}  // namespace
}  // namespace M3_LEVEL
}  // namespace m3
