// How decoding is cut into blocks: plain C++, a pure function of numbers the host knows.
#pragma once

#include <cstdint>

namespace m3::gpu {

constexpr int kTileVectors = 16;  // a warp decodes at a time: the M of one mma
constexpr int kDequantizeWarps = 4;
constexpr int64_t kBlockVectors = kTileVectors * kDequantizeWarps;

// Blocks beyond these take further tiles instead of starting anew: an H100 (132 SMs) holds eight of those without
// anything to set up. Those with a rotation or a table in shared memory, of which it holds four, set up once.
constexpr int64_t kMostLookUpBlocks = 132 * 8;
constexpr int64_t kMostSetUpBlocks = 132 * 4;
// The fine table lies in shared memory if four blocks still fit an H100's 228 KB beside a rotation of 80 x 80 ...
constexpr int64_t kMostStagedBytes = 40 << 10;
// ... and a block decodes two vectors per entry of a part: fewer, and copying the table moves more than it saves.
constexpr int64_t kVectorsPerEntry = 2;

struct DequantizeShape {
  int64_t blocks;
  bool staged;  // the fine table in shared memory
};

// fine_bytes: of the fine table; entries: of one of its parts.
inline DequantizeShape dequantize_shape(int64_t vectors, int64_t fine_bytes, int64_t entries, bool rotated) {
  const int64_t tiles = (vectors + kBlockVectors - 1) / kBlockVectors;
  const bool staged =
      fine_bytes <= kMostStagedBytes && vectors >= kMostSetUpBlocks * kVectorsPerEntry * entries;
  const int64_t most = staged || rotated ? kMostSetUpBlocks : kMostLookUpBlocks;
  return {tiles < most ? tiles : most, staged};
}

}  // namespace m3::gpu
