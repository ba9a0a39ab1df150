// The codes of 16 vectors, a warp's share: from memory to shared memory, 16 bytes per lane at a time, and from bits to
// places in the tables, one index per lane.
#pragma once

#include "common/cuda/words.cuh"
#include "m3/book.h"
#include "vq_dequantize/heuristics.h"

namespace m3::gpu {

// Where codes lie. Vector i is token i % tokens of head i / tokens % heads of record i / tokens / heads; a call without
// slots is one run of tokens.
struct CodeSource {
  const uint8_t* codes;
  const int32_t* slot;  // of a record; out of 0..slots-1: zeros
  int64_t vectors, slots, heads, tokens;
  int64_t stride[3];  // bytes from slot to slot, head to head, token to token
  int32_t wide;       // every run starts and ends at a multiple of 16 bytes, its codes back to back
};

struct CodeFormat {
  Divider bytes;     // of a code
  Divider parts;     // fine ones
  int32_t first;     // bit of the first fine index
  int32_t coarse_bits, fine_bits, half, width;  // elements of an entry: half of D, D / parts
};

constexpr int kCodeStages = 2;

// Shared memory of a warp: two stages of codes, and the places they name.
struct CodeTile {
  uint8_t* stage;      // [kCodeStages, 16 codes]
  uint32_t* coarse_at; // [16, 2]
  uint32_t* fine_at;   // [16, parts]

  M3_DEVICE CodeTile(char* shared, const CodeFormat& f) {
    stage = reinterpret_cast<uint8_t*>(shared);
    coarse_at = reinterpret_cast<uint32_t*>(stage + kCodeStages * kTileVectors * f.bytes.divisor);
    fine_at = coarse_at + kTileVectors * 2;
  }
};

inline int64_t code_tile_bytes(const CodeFormat& f) {
  return kTileVectors * (kCodeStages * int64_t{f.bytes.divisor} + 4 * (2 + int64_t{f.parts.divisor}));
}

// Offset of a vector's code, -1 where there is none.
template <bool kGather>
M3_DEVICE int64_t code_offset(const CodeSource& s, int64_t vector) {
  if (vector >= s.vectors) return -1;
  if (!kGather) return vector * s.stride[2];
  const auto tokens = static_cast<uint32_t>(s.tokens), heads = static_cast<uint32_t>(s.heads);
  const uint32_t run = static_cast<uint32_t>(vector) / tokens, record = run / heads;
  const int32_t slot = s.slot[record];
  if (slot < 0 || slot >= s.slots) return -1;
  return slot * s.stride[0] + (run - record * heads) * s.stride[1] +
         (static_cast<uint32_t>(vector) - run * tokens) * s.stride[2];
}

// Starts copying the codes of vectors first.. to a stage, zeros for absent ones. Returns which of the 16 there are.
template <bool kGather>
M3_DEVICE uint32_t copy_codes(const CodeSource& s, const CodeFormat& f, int64_t first, uint8_t* stage) {
  const int bytes = static_cast<int>(f.bytes.divisor), all = kTileVectors * bytes;
  const int64_t mine = code_offset<kGather>(s, first + lane_index() % kTileVectors);
  const int64_t left = s.vectors - first;
  int done = 0;
  if (s.wide) {  // a piece of 16 bytes lies in one run
    done = left >= kTileVectors ? all : static_cast<int>(left) * bytes / 16 * 16;
    M3_ROLLED
    for (int from = 0; from < done; from += 32 * 16) {
      const int at = from + lane_index() * 16, vector = f.bytes.quotient(at < done ? at : 0);
      const int64_t code = shuffle(mine, vector);
      const bool here = code >= 0;
      if (at < done) copy_async16(stage + at, s.codes + (here ? code + at - vector * bytes : 0), here);
    }
  }
  M3_ROLLED
  for (int from = done; from < all; from += 32) {
    const int at = from + lane_index(), vector = f.bytes.quotient(at < all ? at : 0);
    const int64_t code = shuffle(mine, vector);
    if (at < all) stage[at] = code >= 0 ? s.codes[code + at - vector * bytes] : 0;
  }
  return ballot(mine >= 0) & 0xFFFF;
}

// `bits` bits of a stage from `bit` on.
M3_DEVICE uint32_t cut_out(const uint8_t* stage, int bit, int bits) {
  const uint32_t* word = reinterpret_cast<const uint32_t*>(stage) + bit / 32;
  const int shift = bit % 32;
  uint32_t value = word[0] >> shift;
  if (shift + bits > 32) value |= word[1] << (32 - shift);
  return value & ((1u << bits) - 1);
}

// Places of the 16 vectors' entries. An entry covers fixed elements of the vector; it is given as the place where
// element 0 would be, so that element d lies d further on, whichever entry it belongs to.
M3_DEVICE void unpack_codes(const CodeTile& tile, const CodeFormat& f, const uint8_t* stage) {
  const int code_bits = static_cast<int>(f.bytes.divisor) * 8, parts = static_cast<int>(f.parts.divisor);
  {
    const int vector = lane_index() / 2, part = lane_index() % 2;
    const uint32_t index = cut_out(stage, vector * code_bits + part * f.coarse_bits, f.coarse_bits);
    tile.coarse_at[lane_index()] = ((static_cast<uint32_t>(part) << f.coarse_bits) + index - part) * f.half;
  }
  M3_ROLLED
  for (int i = lane_index(); i < kTileVectors * parts; i += 32) {
    const int vector = f.parts.quotient(i), part = i - vector * parts;
    const uint32_t index = cut_out(stage, vector * code_bits + f.first + part * f.fine_bits, f.fine_bits);
    tile.fine_at[i] = ((static_cast<uint32_t>(part) << f.fine_bits) + index - part) * f.width;
  }
}

}  // namespace m3::gpu
