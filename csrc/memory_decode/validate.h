// Value checks of memory_decode's arguments, for its launcher and that of memory_decode_coded.
#pragma once

#include "m3/memory_decode.h"

namespace m3 {
m3_status validate(const M3MemoryDecodeParams& params);
}
