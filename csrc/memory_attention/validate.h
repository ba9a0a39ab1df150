// Value checks of memory_attention's arguments, for the forward and the backward launcher.
#pragma once

#include "m3/memory_attention.h"

namespace m3 {
m3_status validate(const M3MemoryAttentionParams& params);
}
