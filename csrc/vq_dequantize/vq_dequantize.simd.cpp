// Blocks of vectors: codes are unpacked and the coarse entries they name asked for one block ahead; then table entries
// are summed, straight into the result, or into a block on the stack that is multiplied by rot.
#include "m3/vq_dequantize.h"

#include "look_up.h"
#include "rotate.h"
#include "unpack.h"

namespace m3 {
namespace M3_LEVEL {
namespace {

constexpr int64_t kBlock = 32;          // vectors of a block, at most
constexpr int64_t kBlockFloats = 8192;  // and this many floats, at most
constexpr int64_t kBlockPlaces = kRows * (M3_BOOK_MAX_DIM + 2 * kLanes);

struct Places {
  alignas(64) uint32_t at[kBlockPlaces];
};

// Codes in runs of `per_run`, `stride` bytes apart within a run.
struct Codes {
  const uint8_t* const* runs;
  int64_t per_run, stride;
};

// A shape of book, known at compile time or not.
template <int kDim, int kParts>
struct Fixed {
  static int64_t entry_elements(const M3Book&) { return kDim / 2; }
  template <class T, class Out>
  static void look_up(const M3Book& book, const uint32_t* at, Out* row) {
    look_up_fixed<kDim, kParts>(static_cast<const T*>(book.coarse), static_cast<const T*>(book.fine), at, row);
  }
};
struct Any {
  static int64_t entry_elements(const M3Book& book) { return book.dim / 2; }
  template <class T, class Out>
  static void look_up(const M3Book& book, const uint32_t* at, Out* row) {
    look_up_any<T>(book, at, row);
  }
};

// Goes through the codes in blocks.
template <class T, class Shape>
class Walk {
 public:
  Walk(const M3Book& book, const Codes& codes, int64_t count)
      : book_(book), unpacker_(book), codes_(codes), left_(count), block_(kBlock) {
    while (block_ > kRows && (block_ * (book.dim + kPad) > kBlockFloats || block_ * unpacker_.pitch() > kBlockPlaces))
      block_ /= 2;
  }

  // Calls `row(r, places of its entries)` for the vectors r of a block, then `end(vectors in it)`.
  template <class Row, class End>
  void run(const Row& row, const End& end) {
    Places places[2];
    int which = 0;
    int64_t now = unpack(places[0]);
    for (int64_t r = 0; r < now; ++r) ask(places[0].at + r * unpacker_.pitch());
    while (now > 0) {
      const uint32_t *at = places[which].at, *ahead = places[1 - which].at;
      const int64_t next = unpack(places[1 - which]), pitch = unpacker_.pitch();
      for (int64_t r = 0; r < now; ++r) {
        if (r < next) ask(ahead + r * pitch);
        row(r, at + r * pitch);
      }
      end(now);
      now = next, which = 1 - which;
    }
  }

 private:
  // Places of the next block's entries; returns its number of vectors.
  int64_t unpack(Places& places) {
    const int64_t count = left_ < block_ ? left_ : block_;
    for (int64_t r = 0; r < count; ++r) {
      unpacker_.unpack(*codes_.runs + in_run_ * codes_.stride, places.at + r * unpacker_.pitch());
      if (++in_run_ == codes_.per_run) in_run_ = 0, ++codes_.runs;
    }
    left_ -= count;
    return count;
  }

  // Coarse tables (5 MB in the paper's shape) lie outside L1 and L2.
  void ask(const uint32_t* at) const {
    const int64_t bytes = Shape::entry_elements(book_) * static_cast<int64_t>(sizeof(T));
    for (int64_t i = 0; i < 2; ++i) {
      const char* entry = reinterpret_cast<const char*>(static_cast<const T*>(book_.coarse) + at[i]);
      for (int64_t byte = 0; byte < bytes; byte += 64) __builtin_prefetch(entry + byte);
    }
  }

  const M3Book& book_;
  const Unpacker unpacker_;
  Codes codes_;
  int64_t left_, block_, in_run_ = 0;
};

template <class T, class Out, class Shape>
void decode(const M3Book& book, const Codes& codes, int64_t count, Out* out, Shape) {
  Walk<T, Shape> walk(book, codes, count);
  if (book.rot == nullptr) {
    walk.run([&](int64_t r, const uint32_t* at) { Shape::template look_up<T>(book, at, out + r * book.dim); },
             [&](int64_t n) { out += n * book.dim; });
    return;
  }
  if constexpr (kPaired<Out>) {
    if (book.dim <= kPairDim && book.dim % kLanes == 0) {
      alignas(64) uint32_t rot[kPairDim / 2 * kPairDim];
      alignas(64) BF16 rows[kBlock * kPairDim] = {};
      pack_rotation(book.rot, book.dim, rot);
      walk.run([&](int64_t r, const uint32_t* at) { Shape::template look_up<T>(book, at, rows + r * book.dim); },
               [&](int64_t n) {
                 for (int64_t r = 0; r < n; r += kRows)
                   rotate_pairs(rot, book.dim, reinterpret_cast<const uint32_t*>(rows + r * book.dim), n - r,
                                out + r * book.dim);
                 out += n * book.dim;
               });
      return;
    }
  }
  alignas(64) float rows[kBlockFloats] = {};
  const int64_t pitch = book.dim;
  walk.run([&](int64_t r, const uint32_t* at) { Shape::template look_up<T>(book, at, rows + r * pitch); },
           [&](int64_t n) {
             for (int64_t r = 0; r < n; r += kRows)
               rotate(book.rot, book.dim, rows + r * pitch, pitch, n - r, out + r * book.dim);
             out += n * book.dim;
           });
}

template <class T, class Out>
void decode_shape(const M3Book& book, const Codes& codes, int64_t count, Out* out) {
  const auto is = [&](int64_t dim, int64_t parts) { return book.dim == dim && book.fine_parts == parts; };
  if (is(80, 8))
    decode<T>(book, codes, count, out, Fixed<80, 8>{});
  else if (is(64, 8))
    decode<T>(book, codes, count, out, Fixed<64, 8>{});
  else if (is(128, 16))
    decode<T>(book, codes, count, out, Fixed<128, 16>{});
  else
    decode<T>(book, codes, count, out, Any{});
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
