// One item: a sequence x a KV head x a block of its new rows (all of them, but for large groups). Records first, then
// the cache.
#include "m3/memory_decode.h"

#include "common/attention_walk.h"
#include "common/row_blocks.h"

namespace m3 {
namespace M3_LEVEL {
namespace {

template <class T>
void attend(const M3MemoryDecodeParams& p, const RowBlocks& blocks, int64_t begin, int64_t end) {
  const int group = static_cast<int>(p.heads / p.kv_heads), dim = static_cast<int>(p.dim);
  QueryTile tile;
  KeyBlock<T> block;
  int seen[kTileRows];
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
    if (from >= 0)
      for_each_record_block(p.memory, b, from, block, [&](const KeyBlock<T>& keys) { consume(tile, keys, nullptr); });
    const int64_t limit = p.kv_len[b] - left + 1;  // keys the block's first row sees
    const T* k = static_cast<const T*>(p.k_cache) + head * p.k_stride[2];
    const T* v = static_cast<const T*>(p.v_cache) + head * p.v_stride[2];
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
    finish(tile, static_cast<T*>(p.out), p.lse, p.heads, row, head * group, rows, group);
  }
}

}  // namespace

void memory_decode(const M3MemoryDecodeParams& p, const RowBlocks& blocks, int64_t begin, int64_t end) {
  with_dtype(p.dtype, [&](auto tag) { attend<decltype(tag)>(p, blocks, begin, end); });
}

}  // namespace M3_LEVEL
}  // namespace m3
