// One item: a KV head x a block of rows of one chunk. Records first, then the context up to the block's last row.
#include "m3/memory_attention.h"

#include "common/attention_columns.h"
#include "common/row_blocks.h"

namespace m3 {
namespace M3_LEVEL {
namespace {

template <class T>
void attend(const M3MemoryAttentionParams& p, const RowBlocks& blocks, int64_t begin, int64_t end) {
  const int group = static_cast<int>(p.heads / p.kv_heads), dim = static_cast<int>(p.dim);
  QueryTile tile;
  KeyBlock<T> block;
  int seen[kTileRows];
  for (int64_t item = begin; item < end; ++item) {
    const int64_t head = item % p.kv_heads, place = item / p.kv_heads, chunks = p.memory.chunks;
    // Late chunks see more context: taking them from both ends in turn levels the work of contiguous ranges.
    const int64_t turn = place / blocks.count, chunk = turn % 2 ? chunks - 1 - turn / 2 : turn / 2;
    const int64_t row = p.cu_chunk[chunk] + place % blocks.count * blocks.rows;
    const int64_t left = p.cu_chunk[chunk + 1] - row;
    if (left <= 0) continue;
    const int rows = static_cast<int>(left < blocks.rows ? left : blocks.rows);
    const T* q = static_cast<const T*>(p.q) + row * p.q_stride[0] + head * group * p.q_stride[1];
    tile.begin(rows * group, dim, p.scale, p.memory.refs);
    load_rows(q, p.q_stride[0], p.q_stride[1], rows, group, 0, tile);
    begin_mass(tile, 0, p.mass, p.heads, row, head * group, rows, group);

    const int64_t from = record_head(p.memory, head);
    if (from >= 0)
      for_each_record_block(p.memory, chunk, from, block,
                            [&](const KeyBlock<T>& keys) { consume(tile, 0, tile.m, keys, nullptr); });
    if (p.k != nullptr) {
      const int64_t b = sequence_of(p.cu_q, p.sequences, row), first_key = p.cu_k[b];
      const int64_t limit = (p.cu_k[b + 1] - first_key) - (p.cu_q[b + 1] - p.cu_q[b]) + (row - p.cu_q[b]) + 1;
      const T* k = static_cast<const T*>(p.k) + first_key * p.k_stride[0] + head * p.k_stride[1];
      const T* v = static_cast<const T*>(p.v) + first_key * p.v_stride[0] + head * p.v_stride[1];
      const int64_t keys = limit + rows - 1;
      for (int64_t at = 0; at < keys; at += kBlock) {
        block.clear();
        const int n = static_cast<int>(keys - at < kBlock ? keys - at : kBlock);
        block.append(k + at * p.k_stride[0], p.k_stride[0], v + at * p.v_stride[0], p.v_stride[0], n);
        consume(tile, 0, tile.m, block, causal(limit, rows, group, at, n, seen));
      }
    }
    finish(tile, 0, static_cast<T*>(p.out), p.lse, p.heads, row, head * group, rows, group);
  }
}

#if defined(__AMX_BF16__)

// The same, of bf16, on tile registers. Blocks of rows of one chunk and head come one after the other: those that fall
// to one thread share what is done to keys and values. The operations on a query vector are the same in any company.
template <>
void attend<BF16>(const M3MemoryAttentionParams& p, const RowBlocks& blocks, int64_t begin, int64_t end) {
  const int group = static_cast<int>(p.heads / p.kv_heads), dim = static_cast<int>(p.dim);
  const int64_t together = QueryColumns::most(dim) / (blocks.rows * group);
  TileRegisters tiles;
  QueryColumns tile;
  KeyBlock<BF16> block;
  int seen[kStripes * kStripe];
  for (int64_t item = begin, next; item < end; item = next) {
    const int64_t first = item % blocks.count, head = item / blocks.count % p.kv_heads, chunks = p.memory.chunks;
    int64_t taken = blocks.count - first < together ? blocks.count - first : together;
    taken = end - item < taken ? end - item : taken;
    next = item + taken;
    const int64_t turn = item / blocks.count / p.kv_heads, chunk = turn % 2 ? chunks - 1 - turn / 2 : turn / 2;
    const int64_t row = p.cu_chunk[chunk] + first * blocks.rows, left = p.cu_chunk[chunk + 1] - row;
    if (left <= 0) continue;
    const int rows = static_cast<int>(left < taken * blocks.rows ? left : taken * blocks.rows);
    const BF16* q = static_cast<const BF16*>(p.q) + row * p.q_stride[0] + head * group * p.q_stride[1];
    tile.begin(q, p.q_stride, p.heads, row, head * group, rows, group, dim, p.scale, p.mass, p.memory.refs);

    const int64_t from = record_head(p.memory, head);
    if (from >= 0)
      for_each_record_block(p.memory, chunk, from, block,
                            [&](const KeyBlock<BF16>& keys) { tile.consume(tiles, keys, nullptr); });
    if (p.k != nullptr) {
      const int64_t b = sequence_of(p.cu_q, p.sequences, row), first_key = p.cu_k[b];
      const int64_t limit = (p.cu_k[b + 1] - first_key) - (p.cu_q[b + 1] - p.cu_q[b]) + (row - p.cu_q[b]) + 1;
      const BF16* k = static_cast<const BF16*>(p.k) + first_key * p.k_stride[0] + head * p.k_stride[1];
      const BF16* v = static_cast<const BF16*>(p.v) + first_key * p.v_stride[0] + head * p.v_stride[1];
      const int64_t keys = limit + rows - 1;
      for (int64_t at = 0; at < keys; at += kBlock) {
        block.clear();
        const int n = static_cast<int>(keys - at < kBlock ? keys - at : kBlock);
        block.append(k + at * p.k_stride[0], p.k_stride[0], v + at * p.v_stride[0], p.v_stride[0], n);
        tile.consume(tiles, block, causal(limit, rows, group, at, n, seen));
      }
    }
    tile.finish(static_cast<BF16*>(p.out), p.lse);
  }
}

#endif

}  // namespace

void memory_attention(const M3MemoryAttentionParams& p, const RowBlocks& blocks, int64_t begin, int64_t end) {
  with_dtype(p.dtype, [&](auto tag) { attend<decltype(tag)>(p, blocks, begin, end); });
}

}  // namespace M3_LEVEL
}  // namespace m3
