// The instructions of csrc/common/cuda/device.cuh on the host of simt.h. Register layouts of ldmatrix and mma: PTX ISA,
// "Matrix Fragments for mma.m16n8k16" and "Warp-level matrix load instruction: ldmatrix".
#pragma once

#include <cmath>
#include <cstring>

#include "simt.h"

#define M3_KERNEL __attribute__((visibility("default")))
#define M3_DEVICE inline
#define M3_THREADS(...)
#define M3_UNROLL
#define M3_ROLLED

namespace m3::gpu {

constexpr uint32_t kAllLanes = 0xFFFFFFFFu;

inline int thread_index() { return static_cast<int>(simt::thread_index()); }
inline int64_t block_index() { return simt::block_index(); }
inline int64_t grid_size() { return simt::grid_size(); }
inline int lane_index() { return thread_index() % 32; }
inline int warp_index() { return thread_index() / 32; }
inline char* shared_memory() { return simt::shared_memory(); }

inline void sync_block() { simt::sync_block(); }
inline void sync_warp() { simt::meet({"__syncwarp", kAllLanes, nullptr, nullptr}); }

namespace detail {

// Gives every lane the value of the lane it names.
template <class T>
T exchange(const char* name, T value, int source) {
  struct Operand {
    T value;
    int source;
  } mine{value, source};
  simt::meet({name, kAllLanes,
              [](void* const* lanes, uint32_t) {
                T before[32];
                for (int i = 0; i < 32; ++i) before[i] = static_cast<Operand*>(lanes[i])->value;
                for (int i = 0; i < 32; ++i) {
                  Operand& lane = *static_cast<Operand*>(lanes[i]);
                  if (lane.source < 0 || lane.source >= 32)
                    throw simt::Fault("shuffle: reads lane " + std::to_string(lane.source));
                  lane.value = before[lane.source];
                }
              },
              &mine});
  return mine.value;
}

}  // namespace detail

template <class T>
T shuffle(T value, int lane) {
  return detail::exchange("__shfl_sync", value, lane);
}
template <class T>
T shuffle_xor(T value, int mask) {
  return detail::exchange("__shfl_xor_sync", value, lane_index() ^ mask);
}

inline uint32_t ballot(bool set) {
  struct Operand {
    bool set;
    uint32_t all;
  } mine{set, 0};
  simt::meet({"__ballot_sync", kAllLanes,
              [](void* const* lanes, uint32_t) {
                uint32_t all = 0;
                for (int i = 0; i < 32; ++i) all |= uint32_t{static_cast<Operand*>(lanes[i])->set} << i;
                for (int i = 0; i < 32; ++i) static_cast<Operand*>(lanes[i])->all = all;
              },
              &mine});
  return mine.all;
}

inline void copy_async16(void* shared, const void* global, bool present) {
  simt::copy_async(shared, global, 16, present);
}
inline void commit_copies() { simt::commit_copies(); }
template <int GroupsLeft>
void wait_copies() {
  simt::wait_copies(GroupsLeft);
}

namespace detail {

struct Ldmatrix {
  uint32_t (*registers)[4];
  const char* row;  // this lane's: lane i gives row i % 8 of matrix i / 8
};

template <bool Transposed>
void ldmatrix(void* const* lanes, uint32_t) {
  for (int lane = 0; lane < 32; ++lane) {
    if (reinterpret_cast<uintptr_t>(static_cast<Ldmatrix*>(lanes[lane])->row) % 16)
      throw simt::Fault("ldmatrix: the row of lane " + std::to_string(lane) + " is misaligned");
    for (int matrix = 0; matrix < 4; ++matrix) {
      uint16_t pair[2];
      for (int i = 0; i < 2; ++i) {
        const int major = lane / 4, minor = lane % 4 * 2 + i;
        const int row = Transposed ? minor : major, column = Transposed ? major : minor;
        std::memcpy(&pair[i], static_cast<Ldmatrix*>(lanes[matrix * 8 + row])->row + 2 * column, 2);
      }
      std::memcpy(&(*static_cast<Ldmatrix*>(lanes[lane])->registers)[matrix], pair, 4);
    }
  }
}

}  // namespace detail

inline void load_matrices(uint32_t (&registers)[4], const void* row) {
  detail::Ldmatrix mine{&registers, static_cast<const char*>(row)};
  simt::meet({"ldmatrix", kAllLanes, &detail::ldmatrix<false>, &mine});
}
inline void load_matrices_transposed(uint32_t (&registers)[4], const void* row) {
  detail::Ldmatrix mine{&registers, static_cast<const char*>(row)};
  simt::meet({"ldmatrix.trans", kAllLanes, &detail::ldmatrix<true>, &mine});
}

namespace detail {
template <class To, class From>
void move_aligned(To* to, const From* from, size_t bytes) {
  if (reinterpret_cast<uintptr_t>(to) % bytes || reinterpret_cast<uintptr_t>(from) % bytes)
    throw simt::Fault("an access of " + std::to_string(bytes) + " bytes is misaligned");
  std::memcpy(to, from, bytes);
}
}  // namespace detail

inline void store8(void* to, uint32_t a, uint32_t b) {
  alignas(8) const uint32_t pair[2] = {a, b};
  detail::move_aligned(to, pair, 8);
}
inline void store16(float* to, const float (&x)[4]) {
  alignas(16) const float from[4] = {x[0], x[1], x[2], x[3]};
  detail::move_aligned(to, from, 16);
}
template <int N>
void store_words_global(void* to, const uint32_t (&words)[N]) {
  alignas(16) uint32_t from[N];
  std::memcpy(from, words, sizeof from);
  detail::move_aligned(to, from, sizeof from);
}
template <int N>
void store_words_shared(void* to, const uint32_t (&words)[N]) {
  store_words_global(to, words);
}
inline void load16(float (&x)[4], const float* from) {
  alignas(16) float to[4];
  detail::move_aligned(to, from, 16);
  std::memcpy(x, to, 16);
}

inline int count_bits(uint32_t bits) { return __builtin_popcount(bits); }

inline float exp2_fast(float x) { return std::exp2(x); }
inline float log2_fast(float x) { return std::log2(x); }
inline float from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
inline uint32_t to_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

// Element types as bits; conversions round to nearest even.
struct Bf16 {
  uint16_t bits;
};
struct Fp16 {
  uint16_t bits;
};

inline float to_float(Bf16 x) { return from_bits(uint32_t{x.bits} << 16); }
inline float to_float(Fp16 x) {
  const uint32_t sign = (x.bits & 0x8000u) << 16, exponent = x.bits >> 10 & 31, fraction = x.bits & 1023;
  if (exponent == 31) return from_bits(sign | 0x7F800000u | fraction << 13);
  if (exponent == 0) return (sign ? -1.0f : 1.0f) * std::ldexp(static_cast<float>(fraction), -24);
  return from_bits(sign | (exponent + 112) << 23 | fraction << 13);
}

template <class T>
T from_float(float x);
template <>
inline Bf16 from_float<Bf16>(float x) {
  const uint32_t bits = to_bits(x);
  if (x != x) return {0x7FFF};
  return {static_cast<uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16)};
}
template <>
inline Fp16 from_float<Fp16>(float x) {
  const uint16_t sign = static_cast<uint16_t>(to_bits(x) >> 16 & 0x8000u);
  const float size = std::fabs(x);
  if (x != x) return {0x7FFF};
  if (size == 0.0f) return {sign};
  if (size >= 65520.0f) return {static_cast<uint16_t>(sign | 0x7C00)};
  int exponent;
  std::frexp(size, &exponent);
  // Units in the last place: 2^(e - 11) for normal numbers, 2^-24 below them; nearbyint rounds to even.
  const int unit = exponent - 11 < -24 ? -24 : exponent - 11;
  const auto steps = static_cast<uint32_t>(std::nearbyint(std::ldexp(size, -unit)));
  return {static_cast<uint16_t>(sign | (steps + (static_cast<uint32_t>(unit + 24) << 10)))};
}

// Two elements in a register, the first in the low half.
template <class T>
uint32_t pack(float low, float high) {
  return from_float<T>(low).bits | uint32_t{from_float<T>(high).bits} << 16;
}
template <class T>
float low_of(uint32_t pair) {
  return to_float(T{static_cast<uint16_t>(pair)});
}
template <class T>
float high_of(uint32_t pair) {
  return to_float(T{static_cast<uint16_t>(pair >> 16)});
}

// d += a b: a [16, 16] by rows, b [16, 8] by columns, d [16, 8].
template <class T>
void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  struct Operand {
    float* d;
    const uint32_t* a;
    uint32_t b[2];
  } mine{d, a, {b0, b1}};
  simt::meet({"mma.m16n8k16", kAllLanes,
              [](void* const* lanes, uint32_t) {
                float a[16][16], b[16][8];
                for (int lane = 0; lane < 32; ++lane) {
                  const Operand& from = *static_cast<Operand*>(lanes[lane]);
                  const int group = lane / 4, pair = lane % 4 * 2;
                  for (int i = 0; i < 4; ++i) {
                    const int row = group + i % 2 * 8, column = pair + i / 2 * 8;
                    a[row][column] = low_of<T>(from.a[i]), a[row][column + 1] = high_of<T>(from.a[i]);
                  }
                  for (int i = 0; i < 2; ++i)
                    b[pair + i * 8][group] = low_of<T>(from.b[i]), b[pair + i * 8 + 1][group] = high_of<T>(from.b[i]);
                }
                for (int lane = 0; lane < 32; ++lane) {
                  Operand& to = *static_cast<Operand*>(lanes[lane]);
                  for (int i = 0; i < 4; ++i) {
                    const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
                    for (int k = 0; k < 16; ++k) to.d[i] += a[row][k] * b[k][column];
                  }
                }
              },
              &mine});
}

}  // namespace m3::gpu
