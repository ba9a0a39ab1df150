#include "common/tile_gemm.h"

namespace m3 {
namespace M3_LEVEL {

// Eight sums hide the latency of additions; lines are asked for 4 KiB ahead, into L2, since a core's few L1 misses in
// flight cannot fill memory's latency.
uint32_t ceiling_read(const uint8_t* data, int64_t bytes) {
  constexpr int kSums = 8;
  constexpr int64_t kStep = kSums * sizeof(U32);
  U32 sum[kSums] = {};
  for (int64_t at = 0; at + kStep <= bytes; at += kStep) {
    for (int64_t line = 0; line < kStep; line += 64) __builtin_prefetch(data + at + line + 4096, 0, 2);
#pragma GCC unroll 8
    for (int i = 0; i < kSums; ++i) sum[i] += load_pairs(data + at + i * static_cast<int64_t>(sizeof(U32)));
  }
  for (int i = 1; i < kSums; ++i) sum[0] += sum[i];
  uint32_t total = 0;
  for (int i = 0; i < kLanes; ++i) total += sum[0][i];
  return total;
}

#if defined(__AMX_BF16__)

int64_t ceiling_dot(int64_t steps) {
  // Not zeros: with those the processor runs faster than any product of real numbers lets it.
  alignas(64) uint16_t values[2 * kTileWords];
  for (int i = 0; i < 2 * kTileWords; ++i) values[i] = static_cast<uint16_t>(0x3f00 + 37 * i % 97);
  TileRegisters registers;
  tile_zero<0>(), tile_zero<1>(), tile_zero<2>(), tile_zero<3>();
  tile_load<4>(values, 64), tile_load<5>(values, 64), tile_load<6>(values, 64), tile_load<7>(values, 64);
  for (int64_t step = 0; step < steps; ++step)
    tile_dot<0, 4, 6>(), tile_dot<1, 4, 7>(), tile_dot<2, 5, 6>(), tile_dot<3, 5, 7>();
  return steps * 4 * kTileWords * 2 * kTileSide;
}

#else

int64_t ceiling_dot(int64_t steps) {
  constexpr int kSums = kLanes == 16 ? 16 : 8;
  F32 sum[kSums] = {};
  U32 a = U32{} + 0x3f803f80u, b = U32{} + 0x3f003f00u;
  for (int i = 0; i < kSums; ++i) M3_OPAQUE(sum[i]);  // equal sums would be made one
  for (int64_t step = 0; step < steps; ++step) {
#pragma GCC unroll 16
    for (int i = 0; i < kSums; ++i) sum[i] = dot_pairs(sum[i], a, b);
    M3_OPAQUE(a);  // without it the compiler computes a step's products once
  }
  F32 total = {};
  for (int i = 0; i < kSums; ++i) total += sum[i];
  volatile float sink = m3::M3_LEVEL::sum(total);
  (void)sink;
  return steps * kSums * kLanes * 2;
}

#endif

}  // namespace M3_LEVEL
}  // namespace m3
