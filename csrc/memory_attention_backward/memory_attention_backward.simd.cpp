// Three kernels, each the only writer of its gradient, so that nothing is atomic and every sum has one order:
//   queries: an item is a KV head x a row block of a chunk, as in the forward; records and context give grad_q.
//   context: an item is a sequence x a KV head x a block of keys; the rows that see it give grad_k and grad_v.
//   records: an item is a listed slot (at its first place in mem_slot) x a record head; its chunks ascending.
#include "common/row_blocks.h"
#include "memory_attention_backward/grad_tile.h"

namespace m3 {
namespace M3_LEVEL {
namespace {

typedef M3MemoryAttentionBackwardParams Params;

template <class T>
void context_block(const M3MemoryAttentionParams& p, int64_t first, int64_t head, int count, KeyBlock<T>& block) {
  block.clear();
  block.append(static_cast<const T*>(p.k) + first * p.k_stride[0] + head * p.k_stride[1], p.k_stride[0],
               static_cast<const T*>(p.v) + first * p.v_stride[0] + head * p.v_stride[1], p.v_stride[0], count);
}

template <class T>
void query_gradient(const Params& params, const RowBlocks& blocks, int64_t begin, int64_t end) {
  const M3MemoryAttentionParams& p = params.forward;
  const int group = static_cast<int>(p.heads / p.kv_heads), dim = static_cast<int>(p.dim), ld = padded(dim);
  GradTile tile;
  KeyTile keys;
  KeyBlock<T> block;
  alignas(64) float rows_of_k[kBlock * kMaxDim], acc[kTileRows * kMaxDim];
  int seen[kTileRows];
  const auto take = [&](const KeyBlock<T>& taken, const int* visible) {
    keys.load(taken, dim);
    tile.score(keys, taken, visible);
    for (int j = 0; j < taken.count; ++j) pack_row(taken.k[j], dim, 1.f, rows_of_k + j * ld);
    gemm(Strided{tile.ds, kBlock, 1}, Rows<float>{rows_of_k, ld}, tile.m, ld, taken.count, acc, ld, true);
  };
  for (int64_t item = begin; item < end; ++item) {
    const int64_t head = item % p.kv_heads, place = item / p.kv_heads, chunks = p.memory.chunks;
    const int64_t turn = place / blocks.count, chunk = turn % 2 ? chunks - 1 - turn / 2 : turn / 2;
    const int64_t row = p.cu_chunk[chunk] + place % blocks.count * blocks.rows, left = p.cu_chunk[chunk + 1] - row;
    if (left <= 0) continue;
    const int rows = static_cast<int>(left < blocks.rows ? left : blocks.rows);
    tile.load<T>(params, row, head, rows, group);
    memset(acc, 0, sizeof(float) * tile.m * ld);
    const int64_t from = record_head(p.memory, head);
    if (from >= 0)
      for_each_record_block(p.memory, chunk, from, block, [&](const KeyBlock<T>& taken) { take(taken, nullptr); });
    if (p.k != nullptr) {
      const int64_t b = sequence_of(p.cu_q, p.sequences, row);
      const int64_t limit = (p.cu_k[b + 1] - p.cu_k[b]) - (p.cu_q[b + 1] - row) + 1, count = limit + rows - 1;
      for (int64_t at = 0; at < count; at += kBlock) {
        const int n = static_cast<int>(count - at < kBlock ? count - at : kBlock);
        context_block(p, p.cu_k[b] + at, head, n, block);
        take(block, causal(limit, rows, group, at, n, seen));
      }
    }
    for (int i = 0; i < tile.m; ++i) {
      const int64_t to = (row + i / group) * p.heads + head * group + i % group;
      unpack_row(acc + i * ld, dim, p.scale, static_cast<T*>(params.grad_q) + to * dim);
    }
  }
}

template <class T>
void context_gradient(const Params& params, int64_t blocks, int64_t begin, int64_t end) {
  const M3MemoryAttentionParams& p = params.forward;
  const int group = static_cast<int>(p.heads / p.kv_heads), dim = static_cast<int>(p.dim), ld = padded(dim);
  GradTile tile;
  KeyTile keys;
  KeyGradient sums;
  KeyBlock<T> block;
  int seen[kTileRows];
  for (int64_t item = begin; item < end; ++item) {
    const int64_t head = item % p.kv_heads, place = item / p.kv_heads, b = place / blocks;
    // Early keys are seen by more rows: taking them from both ends in turn levels the work of contiguous ranges.
    const int64_t turn = place % blocks, at = (turn % 2 ? blocks - 1 - turn / 2 : turn / 2) * kBlock;
    const int64_t length = p.cu_k[b + 1] - p.cu_k[b], queries = p.cu_q[b + 1] - p.cu_q[b], before = length - queries;
    if (at >= length) continue;
    const int count = static_cast<int>(length - at < kBlock ? length - at : kBlock);
    context_block(p, p.cu_k[b] + at, head, count, block);
    keys.load(block, dim);
    sums.clear(count, ld);
    const int height = kTileRows / group;
    for (int64_t i = at > before ? at - before : 0; i < queries; i += height) {
      const int rows = static_cast<int>(queries - i < height ? queries - i : height);
      tile.load<T>(params, p.cu_q[b] + i, head, rows, group);
      tile.score(keys, block, causal(before + i + 1, rows, group, at, count, seen));
      sums.add(tile, count);
    }
    for (int j = 0; j < count; ++j) {
      const int64_t to = ((p.cu_k[b] + at + j) * p.kv_heads + head) * dim;
      unpack_row(sums.k + j * ld, dim, 1.f, static_cast<T*>(params.grad_k) + to);
      unpack_row(sums.v + j * ld, dim, 1.f, static_cast<T*>(params.grad_v) + to);
    }
  }
}

template <class T>
void record_gradient(const Params& params, int64_t begin, int64_t end) {
  const M3MemoryAttentionParams& p = params.forward;
  const M3Records& memory = p.memory;
  const int group = static_cast<int>(p.heads / p.kv_heads), dim = static_cast<int>(p.dim), ld = padded(dim);
  GradTile tile;
  KeyTile keys;
  KeyGradient sums;
  KeyBlock<T> block;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t entry = item / memory.heads, from = item % memory.heads, slot = memory.slot[entry];
    bool first = slot >= 0;
    for (int64_t e = 0; first && e < entry; ++e) first = memory.slot[e] != slot;
    if (!first) continue;
    const T* k = static_cast<const T*>(memory.k) + slot * memory.k_stride[0] + from * memory.k_stride[1];
    const T* v = static_cast<const T*>(memory.v) + slot * memory.v_stride[0] + from * memory.v_stride[1];
    for (int64_t at = 0; at < memory.length[slot]; at += kBlock) {
      const int64_t left = memory.length[slot] - at;
      const int count = static_cast<int>(left < kBlock ? left : kBlock);
      block.clear();
      block.append(k + at * memory.k_stride[2], memory.k_stride[2], v + at * memory.v_stride[2], memory.v_stride[2],
                   count);
      if (memory.bias) {
        const float* bias = memory.bias + slot * memory.bias_stride[0] + from * memory.bias_stride[1];
        memcpy(block.bias, bias + at, sizeof(float) * count);
        block.biased = true;
      }
      keys.load(block, dim);
      sums.clear(count, ld);
      for (int64_t e = entry; e < memory.chunks * memory.refs; ++e) {
        if (memory.slot[e] != slot) continue;
        const int64_t chunk = e / memory.refs, last = p.cu_chunk[chunk + 1], height = kTileRows / group;
        for (int64_t head = 0; head < p.kv_heads; ++head) {
          if (record_head(memory, head) != from) continue;
          for (int64_t row = p.cu_chunk[chunk]; row < last; row += height) {
            tile.load<T>(params, row, head, static_cast<int>(last - row < height ? last - row : height), group);
            tile.score(keys, block, nullptr);
            sums.add(tile, count);
          }
        }
      }
      const int64_t to = (slot * memory.heads + from) * memory.tokens + at;
      for (int j = 0; j < count; ++j) {
        unpack_row(sums.k + j * ld, dim, 1.f, static_cast<T*>(params.grad_mem_k) + (to + j) * dim);
        unpack_row(sums.v + j * ld, dim, 1.f, static_cast<T*>(params.grad_mem_v) + (to + j) * dim);
      }
      if (params.grad_mem_bias) memcpy(params.grad_mem_bias + to, sums.bias, sizeof(float) * count);
    }
  }
}

}  // namespace

void attention_query_gradient(const Params& params, const RowBlocks& blocks, int64_t begin, int64_t end) {
  with_dtype(params.forward.dtype, [&](auto tag) { query_gradient<decltype(tag)>(params, blocks, begin, end); });
}

void attention_context_gradient(const Params& params, int64_t blocks, int64_t begin, int64_t end) {
  with_dtype(params.forward.dtype, [&](auto tag) { context_gradient<decltype(tag)>(params, blocks, begin, end); });
}

void attention_record_gradient(const Params& params, int64_t begin, int64_t end) {
  with_dtype(params.forward.dtype, [&](auto tag) { record_gradient<decltype(tag)>(params, begin, end); });
}

}  // namespace M3_LEVEL
}  // namespace m3
