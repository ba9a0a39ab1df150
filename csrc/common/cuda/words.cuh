// Several values moved by one instruction, and small integers the hardware has no short code for.
#pragma once

#include <cstring>

#include "common/cuda/device.cuh"

// Before a loop whose addresses, unrolled, would take more registers than they save.
#if defined(__CUDACC__)
#define M3_ROLLED _Pragma("unroll 1")
#else
#define M3_ROLLED
#endif

namespace m3::gpu {

// N values side by side, at an address that is a multiple of their bytes: read and written as one (16 bytes at most).
template <class T, int N>
struct alignas(sizeof(T) * N) Group {
  T at[N];
};
typedef Group<uint32_t, 4> Words;  // what moves bytes without looking at them

template <class To>
M3_DEVICE To load_as(const void* from) {
  return *static_cast<const To*>(from);
}
template <class From>
M3_DEVICE void store_as(void* to, const From& value) {
  *static_cast<From*>(to) = value;
}

// The same in one piece, whatever the compiler knows of the address: without being told, nvcc 13 takes some 8- and
// 16-byte stores apart.
#if defined(__CUDACC__)
#define M3_STORE_WHOLE(name, space, constraint, address)                                                              \
  template <class From>                                                                                               \
  M3_DEVICE void name(void* to, const From& value) {                                                                  \
    uint32_t word[4] = {};                                                                                            \
    memcpy(word, &value, sizeof value);                                                                               \
    if constexpr (sizeof value == 16)                                                                                 \
      asm volatile("st." space ".v4.b32 [%0], {%1,%2,%3,%4};\n" ::constraint(address), "r"(word[0]), "r"(word[1]),    \
                   "r"(word[2]), "r"(word[3])                                                                         \
                   : "memory");                                                                                       \
    else if constexpr (sizeof value == 8)                                                                             \
      asm volatile("st." space ".v2.b32 [%0], {%1,%2};\n" ::constraint(address), "r"(word[0]), "r"(word[1])           \
                   : "memory");                                                                                       \
    else                                                                                                              \
      store_as(to, value);                                                                                            \
  }
M3_STORE_WHOLE(store_global, "global", "l", __cvta_generic_to_global(to))
M3_STORE_WHOLE(store_shared, "shared", "r", shared_address(to))
#undef M3_STORE_WHOLE
#else
template <class From>
void store_global(void* to, const From& value) {
  store_as(to, value);
}
template <class From>
void store_shared(void* to, const From& value) {
  store_as(to, value);
}
#endif

// Quotients by a number that only the host knows, as one multiplication: exact while (x + 1) * divisor <= 2^32.
struct Divider {
  uint32_t divisor = 1, inverse = 0xFFFFFFFFu;

  Divider() = default;
  explicit Divider(int64_t by) : divisor(static_cast<uint32_t>(by)), inverse(0xFFFFFFFFu / divisor) {}
  M3_DEVICE int quotient(int x) const {
    return static_cast<int>(uint64_t{static_cast<uint32_t>(x) + 1} * inverse >> 32);
  }
};

M3_DEVICE int count_bits(uint32_t bits) {
#if defined(__CUDA_ARCH__)
  return __popc(bits);
#else
  return __builtin_popcount(bits);
#endif
}

}  // namespace m3::gpu
