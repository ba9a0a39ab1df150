// How int8_linear's work and workspace are cut: plain C++, for the launcher and every level alike.
#pragma once

#include "m3/int8_linear.h"

namespace m3 {

// A unit of work: at most so many rows of x times so many tiles. Both stay in a second-level cache while they are
// multiplied.
constexpr int64_t kUnitRows = 96, kUnitTiles = 4;

// Rows of x, quantised.
struct Int8Rows {
  uint8_t* values;  // [count, cols]
  float* scale;     // [count]
  int32_t* zero;    // [count]
  int64_t cols, bytes;
};

inline Int8Rows cut_rows(const M3Int8LinearParams& p) {
  const auto whole = [](int64_t bytes) { return (bytes + 63) / 64 * 64; };
  Int8Rows rows{};
  rows.cols = m3_int8_cols(&p.weight);
  const int64_t values = p.count * rows.cols, each = whole(4 * p.count);
  char* const at = static_cast<char*>(p.workspace);
  rows.bytes = values + 2 * each;
  if (at == nullptr) return rows;
  rows.values = reinterpret_cast<uint8_t*>(at);
  rows.scale = reinterpret_cast<float*>(at + values);
  rows.zero = reinterpret_cast<int32_t*>(at + values + each);
  return rows;
}

inline int64_t tile_groups(const M3Int8LinearParams& p) {
  return (m3_int8_tiles(&p.weight) + kUnitTiles - 1) / kUnitTiles;
}

inline int64_t row_groups(const M3Int8LinearParams& p) { return (p.count + kUnitRows - 1) / kUnitRows; }

// Rows of x are cut evenly: a last unit of one row would leave its thread idle.
inline int64_t unit_rows(const M3Int8LinearParams& p) { return (p.count + row_groups(p) - 1) / row_groups(p); }

inline int64_t units(const M3Int8LinearParams& p) { return row_groups(p) * tile_groups(p); }

}  // namespace m3
