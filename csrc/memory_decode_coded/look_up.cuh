// Vectors of the coded basis, looked up by a warp: y = [coarse[0][i0]; coarse[1][i1]] + [fine[0][j0]; ...].
//
// The lanes share the unpacking: lane 0 and 1 find the coarse entries, lane 2 + m the fine entry m. Then each takes
// pairs of elements and asks the lane that knows where the entry begins.
#pragma once

#include "common/cuda/device.cuh"
#include "common/cuda/words.cuh"
#include "m3/book.h"

namespace m3::gpu {

constexpr int kMostParts = 30;  // fine pieces: with the coarse ones, a lane each

// What the host knows of a side's codes.
struct CodeLayout {
  int32_t bytes;     // of a code
  int32_t fine_bit;  // where its fine indices start
  int32_t pieces;    // of 16 bytes that a code can touch, as it begins anywhere in the first

  explicit CodeLayout(const M3Book& book)
      : bytes(static_cast<int32_t>(m3_book_code_bytes(&book))),
        fine_bit(static_cast<int32_t>(8 * m3_book_coarse_bytes(&book))),
        pieces((bytes + 14) / 16 + 1) {}
};

// How the tables are stored. Paired: fine pieces of an even number of elements, so that pairs can be read as one.
template <class Element, bool IsPaired>
struct Tables {
  typedef Element Type;
  static constexpr bool kPaired = IsPaired;
  static constexpr bool kHalf = sizeof(Element) == 2;
};

// Two elements as a table holds them.
struct RawPair {
  uint32_t first = 0, second = 0;
};

template <int D>
class LookUp {
 public:
  // Pairs of a lane: lane_index() + 32 i.
  static constexpr int kPairs = (D / 2 + 31) / 32;
  struct Raw {
    RawPair coarse[kPairs], fine[kPairs];
  };

  M3_DEVICE LookUp(const M3Book& book, const CodeLayout& layout)
      : coarse_(book.coarse),
        fine_(book.fine),
        width_(D / static_cast<int>(book.fine_parts)),
        bytes_(layout.bytes) {
    const int parts = static_cast<int>(book.fine_parts), lane = lane_index() < parts + 2 ? lane_index() : 0;
    const int part = lane < 2 ? lane : lane - 2;
    const int bits = static_cast<int>(lane < 2 ? book.coarse_bits : book.fine_bits);
    first_bit_ = part * bits + (lane < 2 ? 0 : layout.fine_bit);
    mask_ = (1u << bits) - 1;
    entry_ = lane < 2 ? D / 2 : width_;
    base_ = (part << bits) * entry_;
    for (int i = 0; i < kPairs; ++i) part_[i] = 2 * pair(i) / width_, in_[i] = 2 * pair(i) - part_[i] * width_;
  }

  // Where this lane's entry of a code begins in its table, in elements. The code starts `skip` bytes behind `words`,
  // in shared memory; only words that hold some of it are read.
  M3_DEVICE int unpack(const uint32_t* words, int skip) const {
    const int bit = 8 * skip + first_bit_, last = (skip + bytes_ - 1) / 4, at = bit / 32;
    const uint64_t both = words[at] | uint64_t{words[at < last ? at + 1 : at]} << 32;
    return base_ + static_cast<int>(static_cast<uint32_t>(both >> bit % 32) & mask_) * entry_;
  }

  // Starts reading this lane's pairs of the vector whose entries lie at `place`, what unpack() gave each lane.
  template <class Tables>
  M3_DEVICE void read(int place, Raw& raw) const {
    M3_UNROLL
    for (int i = 0; i < kPairs; ++i) {
      const int e = 2 * pair(i), second = e >= D / 2;
      raw.coarse[i] = read_pair<Tables>(coarse_, shuffle(place, second) + e - second * (D / 2));
      const int at = shuffle(place, part_[i] + 2) + in_[i];
      if constexpr (Tables::kPaired) {
        raw.fine[i] = read_pair<Tables>(fine_, at);
      } else {  // a pair may end in the next piece
        const bool over = in_[i] + 1 == width_;
        const int next = shuffle(place, part_[i] + 2 + over) + (over ? 0 : in_[i] + 1);
        raw.fine[i] = {read_one<Tables>(fine_, at), read_one<Tables>(fine_, next)};
      }
    }
  }

  template <class Tables>
  M3_DEVICE static void sum(const Raw& raw, float (&y)[kPairs][2]) {
    M3_UNROLL
    for (int i = 0; i < kPairs; ++i) {
      const RawPair coarse = raw.coarse[i], fine = raw.fine[i];
      if constexpr (!Tables::kHalf) {
        y[i][0] = from_bits(coarse.first) + from_bits(fine.first);
        y[i][1] = from_bits(coarse.second) + from_bits(fine.second);
      } else {
        y[i][0] = low_of<Fp16>(coarse.first) + low_of<Fp16>(fine.first);
        y[i][1] = high_of<Fp16>(coarse.first) +
                  (Tables::kPaired ? high_of<Fp16>(fine.first) : low_of<Fp16>(fine.second));
      }
    }
  }

  // The i-th pair of this lane; lanes without one repeat the last.
  M3_DEVICE static int pair(int i) {
    const int at = lane_index() + 32 * i;
    return at < D / 2 ? at : D / 2 - 1;
  }

 private:
  template <class Tables>
  M3_DEVICE static RawPair read_pair(const void* table, int at) {
    const auto* from = static_cast<const typename Tables::Type*>(table) + at;
    if constexpr (Tables::kHalf) return {load_as<uint32_t>(from), 0};
    const auto both = load_as<Group<uint32_t, 2>>(from);
    return {both.at[0], both.at[1]};
  }
  template <class Tables>
  M3_DEVICE static uint32_t read_one(const void* table, int at) {
    return load_as<typename Tables::Type>(static_cast<const typename Tables::Type*>(table) + at);
  }

  const void *coarse_, *fine_;
  int width_, bytes_;              // of a fine entry in elements; of a code
  int first_bit_, entry_, base_;   // of this lane's index in a code; elements per entry; of the first entry
  uint32_t mask_;
  int part_[kPairs], in_[kPairs];  // the fine piece that each pair begins in, and where in it
};

}  // namespace m3::gpu
