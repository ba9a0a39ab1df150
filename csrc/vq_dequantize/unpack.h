// Codes -> places of the table entries they name, for `*.simd.cpp` files.
#pragma once

#include "m3/book.h"

#include "common/vec.h"

namespace m3 {
namespace M3_LEVEL {
namespace {

constexpr int64_t kMaxCode = (2 * M3_BOOK_MAX_BITS + 7) / 8 + (M3_BOOK_MAX_DIM * M3_BOOK_MAX_BITS + 7) / 8;

// Where a code's 2 + M indices lie, and what an index means: entry i of a part begins at base + i * width in its table
// (elements; 2^24 of them at most). The two coarse parts come first.
class Unpacker {
 public:
  explicit Unpacker(const M3Book& book)
      : coarse_bits_(book.coarse_bits),
        fine_bits_(book.fine_bits),
        parts_(book.fine_parts),
        half_(book.dim / 2),
        width_(book.dim / book.fine_parts),
        first_(8 * m3_book_coarse_bytes(&book)),
        bytes_(m3_book_code_bytes(&book)) {
#if defined(__AVX2__)
    if (!at_once()) return;
    for (int64_t i = 0; i < kPlaces; ++i) {  // lanes without an index repeat the first
      const int64_t part = i < parts_ + 2 ? i : 0;
      const int64_t bit = part < 2 ? part * coarse_bits_ : first_ + (part - 2) * fine_bits_;
      const int64_t bits = part < 2 ? coarse_bits_ : fine_bits_, entry = part < 2 ? half_ : width_;
      for (int64_t byte = 0; byte < 4; ++byte) {
        const int64_t from = bit / 8 + byte;
        bytes_of_[4 * i + byte] = from < bytes_ ? static_cast<uint8_t>(loaded(from)) : 0x80;  // 0x80: a zero
      }
      shift_[i] = static_cast<uint32_t>(bit % 8);
      mask_[i] = (1u << bits) - 1;
      entry_[i] = static_cast<uint32_t>(entry);
      base_[i] = static_cast<uint32_t>(((part < 2 ? part : part - 2) << bits) * entry);
    }
#endif
  }

  // Elements of `at` one vector takes.
  int64_t pitch() const { return (parts_ + 2 + kPlaces - 1) / kPlaces * kPlaces; }

  // at[0], at[1]: into the coarse table; at[2..2 + M): into the fine table.
  inline __attribute__((always_inline)) void unpack(const uint8_t* code, uint32_t* at) const {
#if defined(__AVX512BW__)
    if (at_once()) {
      const __m128i all = _mm_maskz_loadu_epi8(static_cast<__mmask16>((1u << bytes_) - 1), code);
      const __m512i words = _mm512_shuffle_epi8(_mm512_broadcast_i32x4(all), _mm512_loadu_si512(bytes_of_));
      const U32 index = (reinterpret_cast<U32>(words) >> load_pairs(shift_)) & load_pairs(mask_);
      const U32 place = index * load_pairs(entry_) + load_pairs(base_);
      memcpy(at, &place, sizeof place);
      return;
    }
#elif defined(__AVX2__)
    if (at_once()) {
      const __m128i all = _mm_unpacklo_epi64(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(code)),
                                             _mm_loadl_epi64(reinterpret_cast<const __m128i*>(code + bytes_ - 8)));
#pragma GCC unroll 2
      for (int64_t i = 0; i < kPlaces; i += kLanes) {
        const __m256i of = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(bytes_of_ + 4 * i));
        const U32 words = reinterpret_cast<U32>(_mm256_shuffle_epi8(_mm256_broadcastsi128_si256(all), of));
        const U32 index = (words >> load_pairs(shift_ + i)) & load_pairs(mask_ + i);
        const U32 place = index * load_pairs(entry_ + i) + load_pairs(base_ + i);
        memcpy(at + i, &place, sizeof place);
      }
      return;
    }
#endif
    unpack_each(code, at);
  }

 private:
  static constexpr int64_t kPlaces = 16;  // that are worked out at once

#if defined(__AVX512BW__)
  // A code is read whole, by a mask.
  bool at_once() const { return bytes_ <= 16 && parts_ + 2 <= kPlaces; }
  int64_t loaded(int64_t byte) const { return byte; }
#else
  // A code is read as its first and its last eight bytes; where byte `byte` of it then lies.
  bool at_once() const { return bytes_ >= 8 && bytes_ <= 16 && parts_ + 2 <= kPlaces; }
  int64_t loaded(int64_t byte) const { return byte < 8 ? byte : byte + 16 - bytes_; }
#endif

  __attribute__((noinline)) void unpack_each(const uint8_t* code, uint32_t* at) const {
    uint8_t padded[kMaxCode + 4];  // any index can be read as four bytes
    memcpy(padded, code, bytes_);
    for (int64_t i = 0; i < 2; ++i) at[i] = entry(padded, i * coarse_bits_, coarse_bits_, i, half_);
    for (int64_t m = 0; m < parts_; ++m) at[2 + m] = entry(padded, first_ + m * fine_bits_, fine_bits_, m, width_);
  }

  static uint32_t entry(const uint8_t* code, int64_t bit, int64_t bits, int64_t part, int64_t width) {
    uint32_t word;
    memcpy(&word, code + bit / 8, 4);
#if __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
    word = __builtin_bswap32(word);
#endif
    const int64_t index = (word >> (bit % 8)) & ((1u << bits) - 1);
    return static_cast<uint32_t>(((part << bits) + index) * width);
  }

  int64_t coarse_bits_, fine_bits_, parts_, half_, width_, first_, bytes_;
#if defined(__AVX2__)
  uint8_t bytes_of_[4 * kPlaces];
  uint32_t shift_[kPlaces], mask_[kPlaces], entry_[kPlaces], base_[kPlaces];
#endif
};

}  // namespace
}  // namespace M3_LEVEL
}  // namespace m3
