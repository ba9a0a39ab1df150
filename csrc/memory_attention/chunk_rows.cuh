// Which query rows a block of memory_attention or of its gradient works on, and which context they see. Nothing of this
// is known to the host: a chunk's block finds the chunk's sequence, and blocks without rows end.
#pragma once

#include "common/cuda/records.cuh"
#include "m3/memory_attention.h"

namespace m3::gpu {

M3_DEVICE int min_of(int a, int b) { return a < b ? a : b; }

// A sequence's rows in q and in k.
struct SequenceRows {
  int first = 0, rows = 0;
  int first_key = 0, keys = 0;  // 0 keys without context

  M3_DEVICE SequenceRows(const M3MemoryAttentionParams& p, int64_t sequence) {
    if (sequence >= p.sequences) return;
    const int end = clamp_index(p.cu_q[sequence + 1], 0, p.rows);
    first = clamp_index(p.cu_q[sequence], 0, end);
    rows = end - first;
    if (p.k == nullptr) return;
    const int last = clamp_index(p.cu_k[sequence + 1], 0, p.keys);
    first_key = clamp_index(p.cu_k[sequence], 0, last);
    keys = last - first_key;
  }

  // How many keys row `row` of q sees.
  M3_DEVICE int visible(int row) const {
    const int limit = keys - rows + (row - first) + 1;
    return limit < 0 ? 0 : limit < keys ? limit : keys;
  }
};

// The first sequence that ends behind query row `row`: each lane looks at the end of a piece, then all at the pieces of
// one.
M3_DEVICE int64_t sequence_of(const int32_t* cu_q, int64_t sequences, int row) {
  int64_t low = 0, high = sequences;
  while (low < high) {
    const int64_t step = (high - low + 31) / 32, at = low + (lane_index() + 1) * step - 1;
    const int before = __builtin_popcount(ballot(at < high && cu_q[at + 1] <= row));
    low += before * step;
    if (low + step - 1 < high) high = low + step - 1;
  }
  return low < sequences ? low : sequences;
}

// A tile of query vectors (rows x heads of a group, row by row) of one chunk and KV head.
struct ChunkRows {
  int64_t chunk;
  int head, group;
  int first_row;      // of the chunk, in q
  int first_vector;   // of the tile, in the chunk
  int vectors;        // in the chunk

  M3_DEVICE ChunkRows(const M3MemoryAttentionParams& p, int64_t at_chunk, int at_head, int first_of_tile)
      : chunk(at_chunk), head(at_head), group(static_cast<int>(p.heads / p.kv_heads)), first_vector(first_of_tile) {
    const int end = clamp_index(p.cu_chunk[chunk + 1], 0, p.rows);
    first_row = clamp_index(p.cu_chunk[chunk], 0, end);
    vectors = (end - first_row) * group;
  }

  // Of vector `i` of the tile.
  M3_DEVICE bool has(int i) const { return first_vector + i < vectors; }
  M3_DEVICE int row(int i) const { return first_row + (first_vector + i) / group; }
  // Its place in [rows, heads].
  M3_DEVICE int64_t place(const M3MemoryAttentionParams& p, int i) const {
    return row(i) * p.heads + head * group + (first_vector + i) % group;
  }
};

// tile_at(row, 2 k + piece) from at = tile_at(row, piece), piece 0 or 1; `at` may be that of a tile behind others of
// the same kind. Said so, addresses of fragments are made where they are needed; else each costs a register.
template <int D>
M3_DEVICE int fragment_at(int at, int k) {
  return D % 64 == 0 ? at ^ 16 * k : at + 16 * k;
}

// lane_index(), as a value of its own: what is made from it is not kept in registers from one use to the next.
M3_DEVICE int lane_anew() { return shuffle(lane_index(), lane_index()); }

// Starts copying `Count` rows of D elements, by one warp, to the rows from `first` on of the tile at `to`. Row r begins
// at base + row_of(r), which all lanes ask for together; negative: zeros instead.
template <int D, int Count, class T, class RowOf>
M3_DEVICE void copy_rows(const T* base, T* to, int first, const RowOf& row_of) {
  static_assert(Count * D / 8 % 32 == 0, "a warp copies whole rounds");
  const int lane = lane_anew();
  M3_UNROLL
  for (int i = 0; i < Count * D / 8 / 32; ++i) {
    const int r = (lane + 32 * i) / (D / 8), piece = (lane + 32 * i) % (D / 8);
    const int64_t at = row_of(r);
    copy_async16(to + tile_at<D>(first + r, piece), at < 0 ? base : base + at + piece * 8, at >= 0);
  }
}

// Writes `Count` rows of a tile in shared memory, by one warp; row r to base + row_of(r), negative: nowhere.
template <int D, int Count, class T, class RowOf>
M3_DEVICE void store_rows(const T* from, int first, T* base, const RowOf& row_of) {
  static_assert(Count * D / 8 % 32 == 0, "a warp stores whole rounds");
  const int lane = lane_anew();
  M3_UNROLL
  for (int i = 0; i < Count * D / 8 / 32; ++i) {
    const int r = (lane + 32 * i) / (D / 8), piece = (lane + 32 * i) % (D / 8);
    const int64_t at = row_of(r);
    float moved[4];
    load16(moved, reinterpret_cast<const float*>(from + tile_at<D>(first + r, piece)));
    if (at >= 0) store16(reinterpret_cast<float*>(base + at + piece * 8), moved);
  }
}

// 16 rows in mma's layout, as elements, to rows of a tile in shared memory.
template <class T, int D>
M3_DEVICE void put_rows(const float (&x)[D / 8][4], T* to) {
  M3_UNROLL
  for (int n = 0; n < D / 8; ++n) {
    M3_UNROLL
    for (int h = 0; h < 2; ++h)
      *reinterpret_cast<uint32_t*>(to + tile_at<D>(score_row(2 * h), n) + lane_index() % 4 * 2) =
          pack<T>(x[n][2 * h], x[n][2 * h + 1]);
  }
}

}  // namespace m3::gpu
