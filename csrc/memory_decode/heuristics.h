// How memory_decode's work is cut into blocks: plain C++, a pure function of numbers the host knows. Nothing of the
// device is asked for, so the same call gives the same bits on every one.
#pragma once

#include <cstdint>

namespace m3::gpu {

constexpr int kDecodeTile = 16;   // tokens a warp takes at a time
constexpr int kDecodeRows = 16;   // query vectors of a block: the M of one mma
constexpr int kDecodeWarps = 4;

// A block has 64 to 128 tokens under way: 20 to 40 KB at D = 80. One on every SM of an H100 (132) is 2.7 MB, what its
// memory delivers (3.35 TB/s) in the 0.7 us that an access takes. Fewer are split until there are about as many: on an
// H200 twice as many are slower at every shape, their merge takes longer than they save.
constexpr int64_t kEnoughBlocks = 132;
// Every warp has four tiles: with half of that a single sequence takes a third longer.
constexpr int64_t kLeastSplit = 4 * kDecodeWarps * kDecodeTile;
// Where there are enough blocks, splits even out the load, and must pay for one more launch and the merge. Six blocks
// per SM are two rounds of the three that an SM holds, so that little is left over for a last one.
constexpr int64_t kEvenBlocks = 792;
constexpr int64_t kLongSplit = 1024;
// A part's result is written and read again in fp32: 8 D bytes per query vector, against 4 D bytes per token read. 32
// tokens per vector keep that below a sixteenth.
constexpr int64_t kTokensPerVector = 32;

struct DecodePlan {
  int32_t row_tiles;     // blocks of kDecodeRows query vectors per sequence and KV head
  int32_t splits;        // pieces of the context
  int32_t split_tiles;   // tiles in each
  int32_t memory_tiles;  // tiles of memory tokens
  int32_t parts;         // splits, and one more where memory is a split of its own
  int32_t page_shift;    // pages are of 2^page_shift tokens
};

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// group: query heads per KV head. memory_tokens: R K. `apart`: memory is a split of its own even if the context is not
// split (coded records need other queries).
inline DecodePlan decode_plan(int64_t sequences, int64_t kv_heads, int64_t group, int64_t max_q, int64_t max_kv,
                              int64_t memory_tokens, bool apart) {
  const int64_t vectors = max_q * group, row_tiles = ceil_div(vectors, kDecodeRows);
  const int64_t blocks = sequences * kv_heads * row_tiles, tiles = ceil_div(max_kv, kDecodeTile);
  const int64_t in_block = vectors < kDecodeRows ? vectors : kDecodeRows;
  int64_t least = in_block * kTokensPerVector;
  const bool few = blocks < kEnoughBlocks;
  const int64_t floor = few ? kLeastSplit : kLongSplit, goal = few ? kEnoughBlocks : kEvenBlocks;
  least = least < floor ? floor : least;
  int64_t splits = 1;
  if (blocks > 0 && blocks < goal) {
    const int64_t wanted = ceil_div(goal, blocks), most = max_kv / least;
    splits = wanted < most ? wanted : most;
    splits = splits < 1 ? 1 : splits;
  }
  DecodePlan plan{};
  plan.row_tiles = static_cast<int32_t>(row_tiles);
  plan.split_tiles = static_cast<int32_t>(ceil_div(tiles, splits));
  plan.splits = static_cast<int32_t>(plan.split_tiles > 0 ? ceil_div(tiles, plan.split_tiles) : 1);
  plan.memory_tiles = static_cast<int32_t>(ceil_div(memory_tokens, kDecodeTile));
  plan.parts = plan.splits + (plan.memory_tiles > 0 && (apart || plan.splits > 1) ? 1 : 0);
  return plan;
}

}  // namespace m3::gpu
