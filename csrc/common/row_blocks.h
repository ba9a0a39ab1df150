// How query rows are cut into tiles: a function of sizes alone, so results never depend on the thread count.
#pragma once

#include <stdint.h>

namespace m3 {

struct RowBlocks {
  int64_t rows;   // per block
  int64_t count;  // blocks that cover `longest` rows
};

// Blocks of equal height, at most `limit` query vectors (rows x group) each. A group is at most `limit`.
inline RowBlocks row_blocks(int64_t longest, int64_t group, int64_t limit = 64) {
  const int64_t most = limit / group;
  const int64_t count = longest > 0 ? (longest + most - 1) / most : 1;
  const int64_t rows = longest > 0 ? (longest + count - 1) / count : 1;
  return {rows, count};
}

}  // namespace m3
