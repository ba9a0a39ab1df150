// The vectors of a call one after the other, for `*.simd.cpp` files: table entries are asked for some vectors ahead.
#pragma once

#include "unpack.h"

namespace m3 {
namespace M3_LEVEL {
namespace {

// Codes in runs of `per_run`, `stride` bytes apart within a run.
struct Codes {
  const uint8_t* const* runs;
  int64_t per_run, stride;
};

// T: of the tables.
template <class T>
class Walk {
 public:
  Walk(const M3Book& book, const Codes& codes, int64_t count)
      : unpacker_(book),
        codes_(codes),
        left_(count),
        pitch_(unpacker_.pitch()),
        coarse_(static_cast<const char*>(book.coarse)),
        entry_bytes_(book.dim / 2 * static_cast<int64_t>(sizeof(T))) {
    while (kMostSlots < slots_ * pitch_) slots_ /= 2;
    for (int64_t i = 0; i < slots_ / 2; ++i) ask();
  }

  // Places of the next vector's entries, as Unpacker::unpack leaves them; they stay there for the
  // next three calls at least. Behind the last vector: the last one again.
  inline __attribute__((always_inline)) const uint32_t* next() {
    ask();
    return slot(taken_ < asked_ ? taken_++ : taken_ - 1);
  }

 private:
  static constexpr int64_t kMostSlots = 8 * (M3_BOOK_MAX_DIM + 2 * kLanes);

  uint32_t* slot(int64_t i) { return places_ + (i & (slots_ - 1)) * pitch_; }

  // Unpacks a code and asks for its coarse entries: these tables (5 MB in the paper's shape) lie outside L1 and L2.
  inline __attribute__((always_inline)) void ask() {
    if (left_ == 0) return;
    uint32_t* at = slot(asked_);
    unpacker_.unpack(*codes_.runs + in_run_ * codes_.stride, at);
    for (int64_t i = 0; i < 2; ++i)
      for (int64_t byte = 0; byte < entry_bytes_; byte += 64)
        __builtin_prefetch(coarse_ + at[i] * static_cast<int64_t>(sizeof(T)) + byte);
    if (++in_run_ == codes_.per_run) in_run_ = 0, ++codes_.runs;
    --left_, ++asked_;
  }

  const Unpacker unpacker_;
  Codes codes_;
  int64_t left_, in_run_ = 0, asked_ = 0, taken_ = 0, slots_ = 16;
  const int64_t pitch_;
  const char* coarse_;
  const int64_t entry_bytes_;
  alignas(64) uint32_t places_[kMostSlots];
};

}  // namespace
}  // namespace M3_LEVEL
}  // namespace m3
