// Failed checks become a status and a thread-local message; nothing here throws.
#pragma once

#include "m3/api.h"

namespace m3 {

// Formats like printf into m3_last_error() and returns `status`.
m3_status fail(m3_status status, const char* format, ...) __attribute__((format(printf, 2, 3)));

}  // namespace m3

#define M3_CHECK(condition, ...)                                  \
  do {                                                            \
    if (!(condition)) return ::m3::fail(M3_INVALID, __VA_ARGS__); \
  } while (0)
