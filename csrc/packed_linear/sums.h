// What packed_linear's kernels offer to ops that go on with their sums: packed_linear_sums(params, tiles, count, row,
// rows, sum, pitch) makes sum [rows, 16 count], rows `pitch` apart, = rows [row, row + rows) of x times `count` tiles of
// the weight; nothing is written to params.out. params.count alone chooses the kernel, so that a row's sums are the same
// however tiles and rows are cut (rows at multiples of kSumUnit).
#pragma once

namespace m3 {

constexpr int kSumTiles = 4;   // at most, at once
constexpr int kSumRows = 256;  // at most; the sums are 64 KiB then
constexpr int kSumUnit = 8;

}  // namespace m3
