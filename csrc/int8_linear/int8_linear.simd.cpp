// Lanes run over the 16 rows of a tile: four columns of a row of x are broadcast to all of them. At level amx a block of
// 64 columns, of a tile as of rows of x, is an operand of the tile registers as it lies.
#include "common/tile_gemm.h"
#include "int8_linear/quads.h"
#include "int8_linear/units.h"

namespace m3 {
namespace M3_LEVEL {
namespace {

constexpr int kTile = M3_INT8_ROWS;
constexpr int kParts = kTile / kLanes;  // vectors that hold one value of each row of a tile

typedef uint8_t Bytes __attribute__((vector_size(kLanes)));

// Zeros stand for what lies behind the row.
template <class T>
inline F32 load_some(const T* x, int64_t left) {
  if (left >= kLanes) return load(x);
  T some[kLanes] = {};
  memcpy(some, x, sizeof(T) * left);
  return load(some);
}

template <class T>
void quantise(const T* x, int64_t cols, int64_t padded, uint8_t* out, float* scale, int32_t* zero) {
  F32 least = {}, most = {};
  for (int64_t c = 0; c < cols; c += kLanes) {
    const F32 v = load_some(x + c, cols - c);
    least = -max(-v, -least), most = max(v, most);
  }
  float low = 0.f, high = 0.f;
  for (int i = 0; i < kLanes; ++i) {
    low = least[i] < low ? least[i] : low;
    high = most[i] > high ? most[i] : high;
  }
  const float width = high - low, inverse = width > 0.f ? 255.f / width : 0.f;
  const int32_t at_zero = round_lanes(splat(-low * inverse))[0];
  *scale = width / 255.f, *zero = at_zero;
  for (int64_t c = 0; c < padded; c += kLanes) {
    I32 u = {};
    if (c < cols) u = round_lanes(load_some(x + c, cols - c) * inverse) + at_zero;
    u = u < 0 ? I32{} : u;
    u = u > 255 ? I32{} + 255 : u;
    const Bytes bytes = __builtin_convertvector(u, Bytes);
    memcpy(out + c, &bytes, sizeof bytes);
  }
}

// x (1 + erf(x / sqrt 2)) / 2 = x (1/2 + c p(c^2)), c being x cut off at +-5: p is a polynomial of erf(sqrt(u / 2)) / (2 sqrt u)
// in v = 2 u / 25 - 1, by least squares on Chebyshev points and exact at the end. Absolute error below 3e-6.
inline F32 gelu(F32 x) {
  constexpr float kEnd = 5.f;
  constexpr float kP[] = {0.141363785f,  -0.0702984333f, 0.05152338f,    -0.0403860398f, 0.0313772f,     -0.0236701816f,
                          0.0168400537f, -0.0100326808f, 0.00520828739f, -0.00405052537f, 0.00315045868f, -0.00102529803f};
  const F32 cut = max(-max(-x, splat(-kEnd)), splat(-kEnd));
  const F32 v = cut * cut * (2.f / (kEnd * kEnd)) - 1.f;
  F32 p = splat(kP[11]);
#pragma GCC unroll 12
  for (int i = 10; i >= 0; --i) p = p * v + kP[i];
  return x * (0.5f + cut * p);
}

// Sums of one row and tile -> out, as far as the weight has rows.
template <class T>
inline void write(const M3Int8LinearParams& p, const Int8Rows& x, int64_t row, int64_t tile, const int32_t* sums) {
  const uint8_t* const about = p.weight.data + (tile + 1) * m3_int8_tile_bytes(&p.weight) - 12 * kTile;
  const int64_t left = p.weight.rows - tile * kTile;
  T whole[kTile];
  T* const out = static_cast<T*>(p.out) + row * p.out_stride + tile * kTile;
  T* const to = left >= kTile ? out : whole;
  for (int c = 0; c < kTile; c += kLanes) {
    F32 scale, bias;
    I32 total, sum;
    memcpy(&scale, about + 4 * c, sizeof scale);
    memcpy(&total, about + 4 * (kTile + c), sizeof total);
    memcpy(&bias, about + 4 * (2 * kTile + c), sizeof bias);
    memcpy(&sum, sums + c, sizeof sum);
    const F32 v = __builtin_convertvector(sum - total * x.zero[row], F32) * (scale * x.scale[row]) + bias;
    store(to + c, p.gelu ? gelu(v) : v);
  }
  if (left < kTile) memcpy(out, whole, sizeof(T) * left);
}

// sums [Rows, Tiles, 16] of rows of x times tiles.
template <int Rows, int Tiles>
inline void products(const uint8_t* x, int64_t cols, const uint8_t* tiles, int64_t tile_bytes, int32_t* sums) {
  constexpr int kSide = Tiles * kParts;
  I32 sum[Rows][kSide] = {};
  for (int64_t c = 0; c < cols; c += 4) {
#pragma GCC unroll 8
    for (int v = 0; v < kSide; ++v) {
      const Weights w(tiles + v / kParts * tile_bytes + kTile * c + v % kParts * sizeof(U32));
#pragma GCC unroll 8
      for (int m = 0; m < Rows; ++m) add_products(sum[m][v], w, Values(x + m * cols + c));
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < Rows; ++m)
#pragma GCC unroll 8
    for (int v = 0; v < kSide; ++v) memcpy(sums + m * Tiles * kTile + v * kLanes, &sum[m][v], sizeof(I32));
}

template <class T, int Rows, int Tiles>
inline void finish_products(const M3Int8LinearParams& p, const Int8Rows& x, int64_t row, int64_t tile) {
  alignas(64) int32_t sums[Rows * Tiles * kTile];
  const int64_t bytes = m3_int8_tile_bytes(&p.weight);
  products<Rows, Tiles>(x.values + row * x.cols, x.cols, p.weight.data + tile * bytes, bytes, sums);
  for (int m = 0; m < Rows; ++m)
    for (int t = 0; t < Tiles; ++t) write<T>(p, x, row + m, tile + t, sums + (m * Tiles + t) * kTile);
}

template <class T, int Tiles>
void rows_times(const M3Int8LinearParams& p, const Int8Rows& x, int64_t row, int64_t end, int64_t tile) {
  for (; row + kRowsAtOnce <= end; row += kRowsAtOnce) finish_products<T, kRowsAtOnce, Tiles>(p, x, row, tile);
  for (; row + 2 <= end; row += 2) finish_products<T, 2, Tiles>(p, x, row, tile);
  if (row < end) finish_products<T, 1, Tiles>(p, x, row, tile);
}

#if defined(__AMX_BF16__)

// Up to 32 rows of x times one or two tiles.
template <class T, bool Lower, bool Right>
void tile_products(const M3Int8LinearParams& p, const Int8Rows& x, int64_t row, int rows, int64_t tile) {
  constexpr int kSums = 1 + Right;
  alignas(64) int32_t sums[2 * kTile][2 * kTile];
  const uint8_t *above = x.values + row * x.cols, *below = above + kTile * x.cols;
  const uint8_t *first = p.weight.data + tile * m3_int8_tile_bytes(&p.weight),
                *second = first + m3_int8_tile_bytes(&p.weight);
  tile_zero<0>(), tile_zero<1>(), tile_zero<2>(), tile_zero<3>();
  for (int64_t c = 0; c < x.cols; c += M3_INT8_COLS) {
    tile_load<4>(above + c, x.cols);
    tile_load<6>(first + kTile * c, 64);
    tile_dot_bytes<0, 4, 6>();
    if constexpr (Right) {
      tile_load<7>(second + kTile * c, 64);
      tile_dot_bytes<1, 4, 7>();
    }
    if constexpr (Lower) {
      tile_load<5>(below + c, x.cols);
      tile_dot_bytes<2, 5, 6>();
    }
    if constexpr (Lower && Right) tile_dot_bytes<3, 5, 7>();
  }
  tile_store<0>(sums[0], sizeof sums[0]);
  if constexpr (Right) tile_store<1>(sums[0] + kTile, sizeof sums[0]);
  if constexpr (Lower) tile_store<2>(sums[kTile], sizeof sums[0]);
  if constexpr (Lower && Right) tile_store<3>(sums[kTile] + kTile, sizeof sums[0]);
  for (int m = 0; m < rows; ++m)
    for (int t = 0; t < kSums; ++t) write<T>(p, x, row + m, tile + t, sums[m] + t * kTile);
}

template <class T>
void unit(const M3Int8LinearParams& p, const Int8Rows& x, int64_t row, int64_t end, int64_t tile, int64_t last) {
  TileRegisters registers;
  for (; row < end; row += 2 * kTile) {
    const int rows = static_cast<int>(end - row < 2 * kTile ? end - row : 2 * kTile);
    const int upper = rows < kTile ? rows : kTile, lower = rows - upper;
    registers.shape(upper, lower > 0 ? lower : kTile);
    for (int64_t t = tile; t < last; t += 2) {
      const bool right = t + 1 < last;
      if (lower > 0)
        right ? tile_products<T, true, true>(p, x, row, rows, t) : tile_products<T, true, false>(p, x, row, rows, t);
      else
        right ? tile_products<T, false, true>(p, x, row, rows, t) : tile_products<T, false, false>(p, x, row, rows, t);
    }
  }
}

#else

template <class T>
void unit(const M3Int8LinearParams& p, const Int8Rows& x, int64_t row, int64_t end, int64_t tile, int64_t last) {
  for (; tile + kTilesAtOnce <= last; tile += kTilesAtOnce) rows_times<T, kTilesAtOnce>(p, x, row, end, tile);
  for (; tile < last; ++tile) rows_times<T, 1>(p, x, row, end, tile);
}

#endif

}  // namespace

void quantise_rows(const M3Int8LinearParams& p, const Int8Rows& to, int64_t begin, int64_t end) {
  with_dtype(p.x_dtype, [&](auto tag) {
    const auto* x = static_cast<const decltype(tag)*>(p.x);
    for (int64_t m = begin; m < end; ++m)
      quantise(x + m * p.x_stride, p.weight.cols, to.cols, to.values + m * to.cols, to.scale + m, to.zero + m);
  });
}

void int8_linear(const M3Int8LinearParams& p, const Int8Rows& x, int64_t begin, int64_t end) {
  const int64_t groups = tile_groups(p), tiles = m3_int8_tiles(&p.weight), rows = unit_rows(p);
  const auto least = [](int64_t a, int64_t b) { return a < b ? a : b; };
  with_dtype(p.out_dtype, [&](auto tag) {
    for (int64_t u = begin; u < end; ++u) {
      const int64_t row = u / groups * rows, tile = u % groups * kUnitTiles;
      unit<decltype(tag)>(p, x, row, least(row + rows, p.count), tile, least(tile + kUnitTiles, tiles));
    }
  });
}

}  // namespace M3_LEVEL
}  // namespace m3
