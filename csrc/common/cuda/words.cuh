// Several values moved by one instruction, and divisions by numbers the compiler does not know.
#pragma once

#include <cstring>

#include "common/cuda/device.cuh"

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

// The same for a known memory, never taken apart.
template <class From>
M3_DEVICE void store_global(void* to, const From& value) {
  if constexpr (sizeof value == 8 || sizeof value == 16) {
    uint32_t words[sizeof value / 4];
    memcpy(words, &value, sizeof value);
    store_words_global(to, words);
  } else {
    store_as(to, value);
  }
}
template <class From>
M3_DEVICE void store_shared(void* to, const From& value) {
  if constexpr (sizeof value == 8 || sizeof value == 16) {
    uint32_t words[sizeof value / 4];
    memcpy(words, &value, sizeof value);
    store_words_shared(to, words);
  } else {
    store_as(to, value);
  }
}

// Quotients by a number that only the host knows, as one multiplication: exact while (x + 1) * divisor <= 2^32.
struct Divider {
  uint32_t divisor = 1, inverse = 0xFFFFFFFFu;

  Divider() = default;
  explicit Divider(int64_t by) : divisor(static_cast<uint32_t>(by)), inverse(0xFFFFFFFFu / divisor) {}
  M3_DEVICE int quotient(int x) const {
    return static_cast<int>(uint64_t{static_cast<uint32_t>(x) + 1} * inverse >> 32);
  }
};

}  // namespace m3::gpu
