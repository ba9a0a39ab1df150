// A block of memory_decode and memory_decode_coded: one part of the tokens of a sequence, for 16 query vectors (rows x
// heads of a group) of one KV head. Each of its warps goes through every fourth tile of 16 tokens on its own, with
// copies of its own under way, and their results are joined at the end: nothing waits for the block in between.
#pragma once

#include "common/cuda/records.cuh"
#include "m3/memory_decode.h"
#include "memory_decode/heuristics.h"

namespace m3::gpu {

constexpr int kDecodeThreads = 32 * kDecodeWarps;
constexpr int kDecodeStages = 2;
// Blocks an SM should hold: as many as shared memory lets an H100 have at D = 128. It bounds the registers by 168.
constexpr int kDecodeResident = 3;

// What parts leave for the merge, and raw scores of memory tokens for their mass.
struct DecodeWorkspace {
  float* out;    // [parts, Tq, Hq, D], each part's own softmax; not written where lse is -inf
  float* lse;    // [parts, Tq, Hq] base 2
  float* score;  // [Tq, Hq, R K] base 2, bias included
};

// Blocks start in the order of their numbers. Those that take longest come first, or the parts of a sequence one behind
// the other, so that blocks that wait for look-ups run beside blocks that wait for memory.
enum class PartOrder { kContextFirst, kMemoryFirst, kSideBySide };

struct DecodeBlock {
  int64_t sequence;
  int head, part, row_tile, group;
  int first_row, rows;       // of the sequence in q
  int length;                // kv_len
  int vectors;               // query vectors of this block, 16 at most
  int first_tile, end_tile;  // of the context

  M3_DEVICE DecodeBlock(const M3MemoryDecodeParams& p, const DecodePlan& plan,
                        PartOrder order = PartOrder::kContextFirst) {
    auto at = static_cast<uint32_t>(block_index());
    const auto parts = static_cast<uint32_t>(plan.parts), tiles_of_rows = static_cast<uint32_t>(plan.row_tiles),
               heads = static_cast<uint32_t>(p.kv_heads),
               each = tiles_of_rows * heads * static_cast<uint32_t>(p.sequences);
    if (order == PartOrder::kSideBySide)
      part = static_cast<int>(at % parts), at /= parts;
    else
      part = static_cast<int>(at / each), at %= each;
    if (order == PartOrder::kMemoryFirst) part = part == 0 ? plan.parts - 1 : part - 1;
    row_tile = static_cast<int>(at % tiles_of_rows), at /= tiles_of_rows;
    head = static_cast<int>(at % heads);
    sequence = at / heads;
    group = static_cast<int>(p.heads / p.kv_heads);
    const int end = clamp_index(p.cu_q[sequence + 1], 0, p.rows);
    first_row = clamp_index(p.cu_q[sequence], 0, end);
    rows = end - first_row;
    length = clamp_index(p.kv_len[sequence], 0, p.block_table ? p.page * p.max_pages : p.page);
    const int left = rows * group - row_tile * kTileRows;
    vectors = left < kTileRows ? left : kTileRows;
    const int last = row_tile * kTileRows + vectors - 1;  // its row sees the most
    const int tiles = vectors > 0 ? (visible(last) + kTileTokens - 1) / kTileTokens : 0;
    first_tile = part < plan.splits ? part * plan.split_tiles : tiles;
    end_tile = first_tile + plan.split_tiles < tiles ? first_tile + plan.split_tiles : tiles;
    if (end_tile < first_tile) end_tile = first_tile;
  }

  // Of the sequence's query vectors: its row, its query head, and how many tokens of the cache it sees.
  M3_DEVICE int row_of(int vector) const { return first_row + vector / group; }
  M3_DEVICE int head_of(int vector) const { return head * group + vector % group; }
  M3_DEVICE int visible(int vector) const {
    const int limit = length - rows + vector / group + 1;
    return limit > 0 ? limit : 0;
  }
};

// 16 rows of 16-byte pieces, spread over a warp: the i-th of a lane is piece `piece` of row `row`. Where a round covers
// whole rows, a lane keeps its piece and goes down the rows: fewer addresses to hold.
template <int D>
struct Pieces {
  static constexpr int kPerLane = kTileTokens * D / 8 / 32, kRow = D / 8;
  static constexpr bool kWhole = 32 % kRow == 0;
  static_assert(kTileTokens * D / 8 % 32 == 0, "a warp copies whole rounds");
  M3_DEVICE static int row(int i) {
    return kWhole ? lane_index() / kRow + 32 / kRow * i : (lane_index() + 32 * i) / kRow;
  }
  M3_DEVICE static int piece(int i) { return kWhole ? lane_index() % kRow : (lane_index() + 32 * i) % kRow; }
  // Elements from the tile's first row, of rows `stride` apart.
  M3_DEVICE static int offset(int i, int stride) {
    if (kWhole) return row(0) * stride + piece(0) * 8 + i * (32 / kRow * stride);
    return row(i) * stride + piece(i) * 8;
  }
};

// How many tokens of the cache a lane's two rows of scores see.
struct Visible {
  int tokens[2];

  M3_DEVICE explicit Visible(const DecodeBlock& block) {
    for (int h = 0; h < 2; ++h) tokens[h] = block.visible(block.row_tile * kTileRows + score_row(2 * h));
  }
};

// The cache's first index for a tile of the context, -1 for a page that does not exist. Pages are powers of two of at
// least a tile: a tile lies in one.
M3_DEVICE int64_t tile_place(const M3MemoryDecodeParams& p, const DecodePlan& plan, const DecodeBlock& block,
                             int tile) {
  if (!p.block_table) return block.sequence;
  const int page = tile * kTileTokens >> plan.page_shift;
  const int64_t place = p.block_table[block.sequence * p.max_pages + page];
  return place < p.pages ? place : -1;
}

// Starts copying tile `tile` of the context: keys to stage[0..16), values behind them. A copy that is not to happen
// does not look at its address.
template <class T, int D>
M3_DEVICE void copy_context(const M3MemoryDecodeParams& p, const DecodePlan& plan, const DecodeBlock& block, int tile,
                            T* stage) {
  const int first = tile * kTileTokens;
  const int64_t found = tile_place(p, plan, block, tile), place = found < 0 ? 0 : found;
  const int present = found < 0 ? 0 : block.length - first;
  const int row = p.block_table ? first & ((1 << plan.page_shift) - 1) : first;
  const T* k = static_cast<const T*>(p.k_cache) + place * p.k_stride[0] + row * p.k_stride[1] +
               block.head * p.k_stride[2];
  const T* v = static_cast<const T*>(p.v_cache) + place * p.v_stride[0] + row * p.v_stride[1] +
               block.head * p.v_stride[2];
  const int k_stride = static_cast<int>(p.k_stride[1]), v_stride = static_cast<int>(p.v_stride[1]);  // check_decode
  M3_UNROLL
  for (int i = 0; i < Pieces<D>::kPerLane; ++i) {
    const int r = Pieces<D>::row(i);
    T* to = stage + tile_at<D>(r, Pieces<D>::piece(i));
    copy_async16(to, k + Pieces<D>::offset(i, k_stride), r < present);
    copy_async16(to + kTileTokens * D, v + Pieces<D>::offset(i, v_stride), r < present);
  }
}

// The same for tile `tile` of the memory tokens.
template <class T, int D>
M3_DEVICE void copy_memory(const M3Records& memory, const DecodeBlock& block, int record_head, int tile, T* stage) {
  const MemoryToken mine =
      memory_token(memory, block.sequence, record_head, tile * kTileTokens + lane_index() % kTileTokens);
  const int64_t slot = mine.slot < 0 ? 0 : mine.slot;
  const auto row_of = [&](const int64_t* stride) {
    return slot * stride[0] + record_head * stride[1] + mine.position * stride[2];
  };
  const int64_t k_at = row_of(memory.k_stride), v_at = row_of(memory.v_stride);
  const uint32_t present = ballot(mine.slot >= 0);
  const T* k = static_cast<const T*>(memory.k);
  const T* v = static_cast<const T*>(memory.v);
  M3_UNROLL
  for (int i = 0; i < Pieces<D>::kPerLane; ++i) {
    const int r = Pieces<D>::row(i), piece = Pieces<D>::piece(i), c = piece * 8;
    const bool here = present >> r & 1;
    const int64_t k_row = shuffle(k_at, r), v_row = shuffle(v_at, r);
    T* to = stage + tile_at<D>(r, piece);
    copy_async16(to, k + k_row + c, here);
    copy_async16(to + kTileTokens * D, v + v_row + c, here);
  }
}

// The block's query vectors to shared memory, by all threads; zeros where there is none.
template <class T, int D>
M3_DEVICE void copy_queries(const M3MemoryDecodeParams& p, const DecodeBlock& block, T* rows) {
  for (int piece = thread_index(); piece < kTileRows * D / 8; piece += kDecodeThreads) {
    const int r = piece / (D / 8), c = piece % (D / 8) * 8;
    const int vector = block.row_tile * kTileRows + r;
    const bool here = r < block.vectors;
    const T* from = static_cast<const T*>(p.q);
    if (here) from += block.row_of(vector) * p.q_stride[0] + block.head_of(vector) * p.q_stride[1] + c;
    copy_async16(rows + tile_at<D>(r, piece % (D / 8)), from, here);
  }
}

// Scores of a tile of the context: scaled, and -inf where a row does not see a token.
M3_DEVICE void mask_context(const M3MemoryDecodeParams& p, const DecodePlan& plan, const DecodeBlock& block,
                            const Visible& visible, int tile, float scale, TileScores& s) {
  const bool known = tile_place(p, plan, block, tile) >= 0;
  M3_UNROLL
  for (int h = 0; h < 2; ++h) {
    const int seen = known ? visible.tokens[h] - tile * kTileTokens : 0;
    M3_UNROLL
    for (int n = 0; n < 2; ++n) {
      M3_UNROLL
      for (int i = 2 * h; i < 2 * h + 2; ++i) s[n][i] = score_token(n, i) < seen ? s[n][i] * scale : kMinusInfinity;
    }
  }
}

// Scores of a tile of memory tokens: scaled and biased, -inf for absent ones; and kept for the mass.
M3_DEVICE void bias_memory(const M3MemoryDecodeParams& p, const DecodeBlock& block, int record_head, int tile,
                           float scale, float* kept, TileScores& s) {
  const M3Records& memory = p.memory;
  const int first = tile * kTileTokens;
  const float mine = token_bias(
      memory, memory_token(memory, block.sequence, record_head, first + lane_index() % kTileTokens), record_head);
  const int64_t all = memory.refs * memory.tokens;
  M3_UNROLL
  for (int n = 0; n < 2; ++n) {
    M3_UNROLL
    for (int i = 0; i < 4; ++i) {
      const int token = score_token(n, i), row = score_row(i), vector = block.row_tile * kTileRows + row;
      const float bias = shuffle(mine, token);
      s[n][i] = bias == kMinusInfinity ? kMinusInfinity : s[n][i] * scale + bias;
      if (row < block.vectors && first + token < all)
        kept[(block.row_of(vector) * p.heads + block.head_of(vector)) * all + first + token] = s[n][i];
    }
  }
}

// exp2(score - lse) over the tokens of record r of one query vector.
M3_DEVICE float record_mass(const float* scores, int64_t tokens, int64_t r, float lse) {
  if (lse == kMinusInfinity) return 0.0f;
  float sum = 0.0f;
  for (int64_t j = 0; j < tokens; ++j) sum += exp2_fast(scores[r * tokens + j] - lse);
  return sum;
}

}  // namespace m3::gpu
