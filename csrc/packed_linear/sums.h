// What packed_linear's kernels offer to ops that go on with their sums: packed_linear_sums(params, tiles, count, row,
// rows, sum) makes sum [rows, 16 count] = rows [row, row + rows) of x times `count` tiles of the weight, not written to
// params.out. params.count chooses the kernel: results do not depend on how rows and tiles are cut.
#pragma once

namespace m3 {

constexpr int kSumTiles = 4;   // at most, at once
constexpr int kSumRows = 256;  // at most; the sums are 64 KiB then

}  // namespace m3
