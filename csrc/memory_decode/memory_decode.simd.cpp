// Records first, then the cache (decode_item.h).
#include "memory_decode/decode_item.h"

namespace m3 {
namespace M3_LEVEL {
namespace {

template <class T>
void attend(const M3MemoryDecodeParams& p, const RowBlocks& blocks, int64_t begin, int64_t end) {
  KeyBlock<T> block;
  for_each_decode_item<T, false>(p, blocks, begin, end, [&](QueryTile& tile, int lo, int m, int64_t b, int64_t from) {
    for_each_record_block(p.memory, b, from, block,
                          [&](const KeyBlock<T>& keys) { consume(tile, lo, m, keys, nullptr); });
  });
}

}  // namespace

void memory_decode(const M3MemoryDecodeParams& p, const RowBlocks& blocks, int64_t begin, int64_t end) {
  with_dtype(p.dtype, [&](auto tag) { attend<decltype(tag)>(p, blocks, begin, end); });
}

}  // namespace M3_LEVEL
}  // namespace m3
