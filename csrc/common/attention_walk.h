// How the attention kernels fill tiles: query vectors of a row block, key blocks of records, causal visibility.
#pragma once

#include "common/attention_tile.h"
#include "m3/records.h"

namespace m3 {
namespace M3_LEVEL {
namespace {

// Query vectors of `rows` rows and `group` heads, row by row: vector i is row i / group, head i % group.
template <class T>
inline void load_rows(const T* x, int64_t row_stride, int64_t head_stride, int rows, int group, int dim, float factor,
                      float* out) {
  const int ld = padded(dim);
  for (int r = 0; r < rows; ++r)
    for (int g = 0; g < group; ++g)
      pack_row(x + r * row_stride + g * head_stride, dim, factor, out + (r * group + g) * ld);
}

// The same into vectors lo.. of a tile, in the form its products take. Where blocks of keys are not all of type T, the
// float form is needed beside the pairs (Mixed).
template <class T, bool Mixed = false>
inline void load_rows(const T* x, int64_t row_stride, int64_t head_stride, int rows, int group, int lo,
                      QueryTile& tile) {
  for (int r = 0; r < rows; ++r)
    for (int g = 0; g < group; ++g) {
      const int i = lo + r * group + g;
      const T* row = x + r * row_stride + g * head_stride;
      if constexpr (kByPairs<T>) copy_pairs(row, tile.dim, tile.q_pairs + i * (tile.ld / 2));
      if constexpr (Mixed || !kByPairs<T>) {
        float* const q = tile.q + i * tile.ld;
        for (int d = padded(tile.dim); d < tile.ld; d += kLanes) store(q + d, F32{});
        pack_row(row, tile.dim, tile.scale, q);
      }
    }
}

// The record head that KV head `head` reads, or -1.
inline int64_t record_head(const M3Records& memory, int64_t head) {
  return memory.head_map ? memory.head_map[head] : head;
}

// The valid tokens of chunk `chunk`'s records, in their order, as blocks.
class RecordBlocks {
 public:
  RecordBlocks(const M3Records& memory, int64_t chunk)
      : memory_(memory), slot_(memory.slot + chunk * memory.refs), refs_(static_cast<int>(memory.refs)) {}

  // Fills the block with as many of the next tokens as it holds; false: there are none. append(slot, at, n) adds the
  // rows of tokens at..at + n to it.
  template <class T, class Append>
  bool next(KeyBlock<T>& block, const Append& append) {
    block.clear();
    for (; record_ < refs_ && block.room() > 0; ++record_, token_ = 0) {
      const int64_t slot = slot_[record_];
      if (slot < 0) continue;
      const int left = memory_.length[slot] - token_, n = left < block.room() ? left : block.room();
      if (n > 0) {
        const float* bias = memory_.bias ? memory_.bias + slot * memory_.bias_stride[0] + token_ : nullptr;
        block.runs[block.run_count++] = {block.count, block.count + n, record_, bias};
        append(slot, token_, n);
        token_ += n;
      }
      if (n < left) break;
    }
    return block.count > 0;
  }

  // The same for the rows of record head 0; those of other heads lie a stride further on.
  template <class T>
  bool next(KeyBlock<T>& block) {
    const T *k = static_cast<const T*>(memory_.k), *v = static_cast<const T*>(memory_.v);
    return next(block, [&](int64_t slot, int64_t at, int n) {
      block.append(k + slot * memory_.k_stride[0] + at * memory_.k_stride[2], memory_.k_stride[2],
                   v + slot * memory_.v_stride[0] + at * memory_.v_stride[2], memory_.v_stride[2], n);
    });
  }

 private:
  const M3Records& memory_;
  const int32_t* const slot_;
  const int refs_;
  int record_ = 0, token_ = 0;
};

// The bias of record head `head` for a block's keys.
template <class T>
inline void read_bias(const M3Records& memory, int64_t head, KeyBlock<T>& block) {
  block.biased = memory.bias != nullptr;
  if (!block.biased) return;
  for (int r = 0; r < block.run_count; ++r) {
    const auto& run = block.runs[r];
    memcpy(block.bias + run.begin, run.bias + head * memory.bias_stride[1], sizeof(float) * (run.end - run.begin));
  }
}

// Calls take(block) for blocks of the valid tokens of chunk `chunk`'s records as head `head` has them. append: as above.
template <class T, class Append, class Take>
inline void for_each_record_block(const M3Records& memory, int64_t chunk, int64_t head, KeyBlock<T>& block,
                                  const Append& append, const Take& take) {
  RecordBlocks blocks(memory, chunk);
  while (blocks.next(block, append)) {
    read_bias(memory, head, block);
    take(block);
  }
}

// The same for dense records.
template <class T, class Take>
inline void for_each_record_block(const M3Records& memory, int64_t chunk, int64_t head, KeyBlock<T>& block,
                                  const Take& take) {
  const T* k = static_cast<const T*>(memory.k) + head * memory.k_stride[1];
  const T* v = static_cast<const T*>(memory.v) + head * memory.v_stride[1];
  const auto append = [&](int64_t slot, int64_t at, int n) {
    block.append(k + slot * memory.k_stride[0] + at * memory.k_stride[2], memory.k_stride[2],
                 v + slot * memory.v_stride[0] + at * memory.v_stride[2], memory.v_stride[2], n);
  };
  for_each_record_block(memory, chunk, head, block, append, take);
}

// Row r of a block sees the keys before `limit + r`. Fills seen[i] for the block of keys first..first+count; returns
// null where every row sees all of them.
inline const int* causal(int64_t limit, int rows, int group, int64_t first, int count, int* seen) {
  if (limit >= first + count) return nullptr;
  for (int r = 0; r < rows; ++r) {
    const int64_t n = limit + r - first;
    for (int g = 0; g < group; ++g) seen[r * group + g] = n < 0 ? 0 : n > count ? count : static_cast<int>(n);
  }
  return seen;
}

// The sequence that holds row `row`: the last b with cu[b] <= row.
inline int64_t sequence_of(const int32_t* cu, int64_t sequences, int64_t row) {
  int64_t low = 0, high = sequences;
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    (cu[middle] <= row ? low : high) = middle;
  }
  return low;
}

// For the vectors from lo on: points mass rows into the output and clears them, then writes all results of a tile.
inline void begin_mass(QueryTile& tile, int lo, float* mass, int64_t heads, int64_t row, int64_t head, int rows,
                       int group) {
  for (int r = 0; r < rows; ++r)
    for (int g = 0; g < group; ++g) {
      float* to = mass + ((row + r) * heads + head + g) * tile.refs;
      tile.mass[lo + r * group + g] = to;
      if (tile.refs > 0) memset(to, 0, sizeof(float) * tile.refs);
    }
}

template <class T>
inline void finish(QueryTile& tile, int lo, T* out, float* lse, int64_t heads, int64_t row, int64_t head, int rows,
                   int group) {
  for (int r = 0; r < rows; ++r)
    for (int g = 0; g < group; ++g) {
      const int64_t at = (row + r) * heads + head + g;
      finish_row(tile, lo + r * group + g, out + at * tile.dim, lse + at);
    }
}

}  // namespace
}  // namespace M3_LEVEL
}  // namespace m3
