// Vectors one by one are sums of table entries, written straight into the result, or into a few rows on the stack that
// are then multiplied by rot.
#include "m3/vq_dequantize.h"

#include "look_up.h"
#include "rotate.h"
#include "rotate_tiles.h"
#include "walk.h"

namespace m3 {
namespace M3_LEVEL {
namespace {

// A shape of book, known at compile time or not.
template <int D, int M>
struct Fixed {
  static constexpr int kDim = D;
  template <class T, class Out>
  static void look_up(const M3Book& book, const uint32_t* at, Out* row) {
    look_up_fixed<D, M>(static_cast<const T*>(book.coarse), static_cast<const T*>(book.fine), at, row);
  }
  template <class T, int kAt>
  static F32 look_up_lanes(const M3Book& book, const uint32_t* at) {
    return m3::M3_LEVEL::look_up_lanes<D, M, kAt>(static_cast<const T*>(book.coarse), static_cast<const T*>(book.fine),
                                                  at);
  }
};
struct Any {
  static constexpr int kDim = 0;
  template <class T, class Out>
  static void look_up(const M3Book& book, const uint32_t* at, Out* row) {
    look_up_any<T>(book, at, row);
  }
};

// Rows of D elements of type Row, as elements E of a product: floats as they are, bf16 in pairs.
template <class Row>
struct Product {
  typedef float Element;
  static constexpr int kMostDim = M3_BOOK_MAX_DIM, kDepth = 1;
};
template <>
struct Product<BF16> {
  typedef uint32_t Element;
  static constexpr int kMostDim = 128, kDepth = 2;  // the packed rotation lies on the stack
};

// One of the rows to come is looked up while the present ones are multiplied: table look-ups wait for caches and
// products for the multipliers, so that together they take little longer than the products alone. `sum` gains
// D / kDepth / kRows steps, `row` all its elements.
template <class T, class Shape, int kAt = 0, int kVecs, class Row, class E>
inline __attribute__((always_inline)) void multiply_and_look_up(const M3Book& book, const uint32_t* at, Row* row,
                                                                F32 (&sum)[kRows][kVecs], const E* x, const E* rot) {
  constexpr int kDepth = Shape::kDim / Product<Row>::kDepth, kSteps = kLanes / Product<Row>::kDepth / kRows;
#pragma GCC unroll 8
  for (int e = 0; e < kSteps; ++e) multiply(sum, x + e, kDepth, rot + e * Shape::kDim);
  store(row + kAt, Shape::template look_up_lanes<T, kAt>(book, at));
  if constexpr (kAt + kLanes < Shape::kDim)
    multiply_and_look_up<T, Shape, kAt + kLanes>(book, at, row, sum, x + kSteps, rot + kSteps * Shape::kDim);
}

template <class T, class Shape, class Row, class E, class Out>
void decode_rotated(const M3Book& book, Walk<T>& walk, int64_t count, const E* rot, Out* out) {
  constexpr int kMost = Shape::kDim ? Shape::kDim : Product<Row>::kMostDim;
  constexpr bool kBeside = kLanes == 16 && Shape::kDim > 0 && Shape::kDim <= kMostColumns * kLanes;
  alignas(64) Row rows[1 + kBeside][kRows * kMost] = {};
  const int64_t dim = Shape::kDim ? Shape::kDim : book.dim, depth = dim / Product<Row>::kDepth;
  const auto look_up = [&](Row* to, int64_t n) {
    for (int64_t r = 0; r < n; ++r) Shape::template look_up<T>(book, walk.next(), to + r * dim);
  };
  const auto at_most = [](int64_t n) { return n < kRows ? n : kRows; };
  if constexpr (kBeside) {
    int which = 0;
    look_up(rows[0], at_most(count));
    for (; count > 0; count -= kRows, which = 1 - which, out += kRows * dim) {
      const E* x = reinterpret_cast<const E*>(rows[which]);
      Row* to = rows[1 - which];
      const uint32_t* at[kRows];  // all beforehand: a call in between would move the sums to memory and back
      for (int64_t r = 0; r < kRows; ++r) at[r] = walk.next();
      F32 sum[kRows][Shape::kDim / kLanes] = {};
      for (int64_t r = 0; r < kRows; ++r)
        multiply_and_look_up<T, Shape>(book, at[r], to + r * dim, sum, x + r * depth / kRows,
                                       rot + r * depth / kRows * dim);
      store_rows(sum, count, dim, out);
    }
  } else {
    for (; count > 0; count -= kRows, out += kRows * dim) {
      look_up(rows[0], at_most(count));
      rotate(rot, dim, depth, reinterpret_cast<const E*>(rows[0]), count, out);
    }
  }
}

#if defined(__AMX_BF16__)
// Sixteen rows are looked up while the sixteen before are multiplied.
template <class T, class Shape>
void decode_tiled(const M3Book& book, Walk<T>& walk, int64_t count, BF16* out) {
  constexpr int64_t kRows = TiledRotation::kRows;
  const int64_t dim = Shape::kDim ? Shape::kDim : book.dim;
  TiledRotation rotation(book.rot, dim);
  alignas(64) BF16 rows[2][kRows * TiledRotation::kMostDim] = {};
  const int64_t pitch = rotation.pitch(), steps = rotation.steps();
  const auto look_up = [&](BF16* to, int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) Shape::template look_up<T>(book, walk.next(), to + r * pitch);
  };
  look_up(rows[0], 0, count < kRows ? count : kRows);
  for (int which = 0; count > 0; count -= kRows, which = 1 - which, out += kRows * dim) {
    const int64_t next = count - kRows < kRows ? count - kRows : kRows;
    for (int64_t i = 0; i < steps; ++i) {
      rotation.step(rows[which], i);
      look_up(rows[1 - which], i * next / steps, (i + 1) * next / steps);
    }
    rotation.step(rows[which], steps);
    rotation.store_rows(count, out);
  }
}
#endif

template <class T, class Shape, class Out>
void decode(const M3Book& book, const Codes& codes, int64_t count, Out* out) {
  Walk<T> walk(book, codes, count);
  if (book.rot == nullptr) {
    const int64_t dim = Shape::kDim ? Shape::kDim : book.dim;
    for (int64_t i = 0; i < count; ++i) Shape::template look_up<T>(book, walk.next(), out + i * dim);
    return;
  }
  if constexpr (kPaired<Out>) {
    constexpr int kMost = Product<BF16>::kMostDim;
    if (book.dim <= kMost && book.dim % kLanes == 0) {
#if defined(__AMX_BF16__)
      return decode_tiled<T, Shape>(book, walk, count, out);
#endif
      alignas(64) uint32_t rot[kMost / 2 * kMost];
      pack_rotation(book.rot, book.dim, rot);
      return decode_rotated<T, Shape, BF16>(book, walk, count, rot, out);
    }
  }
  decode_rotated<T, Shape, float>(book, walk, count, book.rot, out);
}

template <class T, class Out>
void decode_shape(const M3Book& book, const Codes& codes, int64_t count, Out* out) {
  const auto is = [&](int64_t dim, int64_t parts) { return book.dim == dim && book.fine_parts == parts; };
  if (count == 0) return;
  if (is(80, 8))
    decode<T, Fixed<80, 8>>(book, codes, count, out);
  else if (is(64, 8))
    decode<T, Fixed<64, 8>>(book, codes, count, out);
  else if (is(128, 16))
    decode<T, Fixed<128, 16>>(book, codes, count, out);
  else
    decode<T, Any>(book, codes, count, out);
}

}  // namespace

void decode_runs(const M3Book& book, const uint8_t* const* runs, int64_t per_run, int64_t stride, int64_t count,
                 void* out, m3_dtype dtype) {
  with_dtype(dtype, [&](auto tag) {
    auto* to = static_cast<decltype(tag)*>(out);
    if (book.dtype == M3_F16)
      decode_shape<F16>(book, Codes{runs, per_run, stride}, count, to);
    else
      decode_shape<float>(book, Codes{runs, per_run, stride}, count, to);
  });
}

void decode_vectors(const M3Book& book, const uint8_t* codes, int64_t stride, int64_t count, void* out,
                    m3_dtype dtype) {
  decode_runs(book, &codes, count, stride, count, out, dtype);
}

}  // namespace M3_LEVEL
}  // namespace m3
