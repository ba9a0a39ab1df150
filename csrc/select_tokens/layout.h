// The workspace of one worker, in floats; shared by the launcher and the kernel. No std headers: see common/vec.h.
#pragma once

#include "m3/select_tokens.h"

namespace m3 {

constexpr int64_t kSelectRows = 16;                 // query vectors scored together, at most
constexpr int64_t kSelectScores = 2 * kSelectRows;  // rows of scores: of two such blocks

struct SelectLayout {
  int64_t columns;                             // keys, padded to four vectors of the widest level
  int64_t width;                               // of a query: floats, or pairs of bf16
  int64_t keys, query, score, weight, highest; // offsets: [width, columns], [16, width], [32, columns], 2 x [columns]
  int64_t floats;
};

// static: a copy per translation unit, so that no SIMD level's code can stand in for the baseline's.
static inline SelectLayout select_layout(const M3SelectTokensParams& p) {
  SelectLayout at;
  at.columns = (p.rows + 63) / 64 * 64;
  at.width = (p.dim + 15) / 16 * 16;
  at.keys = 0;
  at.query = at.keys + at.width * at.columns;
  at.score = at.query + kSelectRows * at.width;
  at.weight = at.score + kSelectScores * at.columns;
  at.highest = at.weight + at.columns;
  at.floats = at.highest + at.columns;
  return at;
}

}  // namespace m3
