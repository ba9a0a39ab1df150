// Records are looked up in the rotated basis and never rotated back one by one: with x = rot^T y,
//   q . x = (rot q) . y   and   sum p x = rot^T sum p y,
// so the query is rotated once before the records and their weighted sum once after them. The cache comes last, with
// the query as it was; both parts share one running softmax.
#include "m3/memory_decode_coded.h"

#include "memory_decode/decode_item.h"

namespace m3 {
namespace M3_LEVEL {

// csrc/vq_dequantize: `count` codes, `stride` bytes apart, into rows [count, D] of `dtype`.
void decode_vectors(const M3Book& book, const uint8_t* codes, int64_t stride, int64_t count, void* out, m3_dtype dtype);

namespace {

// Rows in the coded basis of up to one block of tokens.
struct DecodedBlock {
  alignas(64) float k[kBlock * kMaxDim];
  alignas(64) float v[kBlock * kMaxDim];
};

// tile.q[i] = rot q[i] for the vectors lo..lo + m
void rotate_queries(const M3Book& book, const float* q, QueryTile& tile, int lo, int m) {
  const float* rows[kMaxDim];
  for (int e = 0; e < tile.dim; ++e) rows[e] = book.rot + static_cast<int64_t>(e) * tile.dim;
  dot(q, tile.ld, m, rows, tile.dim, tile.dim, tile.q + lo * tile.ld, tile.ld);
}

// tile.acc[i] = rot^T acc[i]
void rotate_back(const M3Book& book, QueryTile& tile, int lo, int m) {
  alignas(64) float turned[kTileRows * kMaxDim];
  float* acc = tile.acc + lo * tile.ld;
  gemm(Strided{acc, tile.ld, 1}, Rows<float>{book.rot, tile.dim}, m, tile.dim, tile.dim, turned, tile.ld, false);
  for (int i = 0; i < m; ++i) memcpy(acc + i * tile.ld, turned + i * tile.ld, sizeof(float) * tile.dim);
}

void read_records(const M3MemoryDecodeCodedParams& p, const M3Book& k_book, const M3Book& v_book, QueryTile& tile,
                  int lo, int m, int64_t b, int64_t head) {
  DecodedBlock rows;
  KeyBlock<float> block;
  const int64_t dim = tile.dim, k_bytes = m3_book_code_bytes(&k_book), v_bytes = m3_book_code_bytes(&v_book);
  const uint8_t* k_codes = p.k_codes + head * p.k_code_stride[1];
  const uint8_t* v_codes = p.v_codes + head * p.v_code_stride[1];
  const auto append = [&](int64_t slot, int64_t at, int n) {
    float *k = rows.k + block.count * dim, *v = rows.v + block.count * dim;
    decode_vectors(k_book, k_codes + slot * p.k_code_stride[0] + at * k_bytes, k_bytes, n, k, M3_F32);
    decode_vectors(v_book, v_codes + slot * p.v_code_stride[0] + at * v_bytes, v_bytes, n, v, M3_F32);
    block.append(k, dim, v, dim, n);
  };
  for_each_record_block(p.decode.memory, b, head, block, append,
                        [&](const KeyBlock<float>& keys) { consume(tile, lo, m, keys, nullptr); });
}

template <class T>
void attend(const M3MemoryDecodeCodedParams& p, const RowBlocks& blocks, int64_t begin, int64_t end) {
  M3Book k_book = p.k_book, v_book = p.v_book;
  k_book.rot = v_book.rot = nullptr;
  const auto read_head = [&](QueryTile& tile, int lo, int m, int64_t b, int64_t head) {
    alignas(64) float plain[kTileRows * kMaxDim];
    float* q = tile.q + lo * tile.ld;
    if (p.k_book.rot) {
      memcpy(plain, q, sizeof(float) * m * tile.ld);
      rotate_queries(p.k_book, plain, tile, lo, m);
    }
    read_records(p, k_book, v_book, tile, lo, m, b, head);
    if (p.k_book.rot) memcpy(q, plain, sizeof(float) * m * tile.ld);
    if (p.v_book.rot) rotate_back(p.v_book, tile, lo, m);
  };
  const M3Records& memory = p.decode.memory;
  const auto read = [&](QueryTile& tile, int heads, int m, int64_t b, int64_t head) {
    for (int h = 0; memory.refs > 0 && h < heads; ++h) {
      const int64_t from = record_head(memory, head + h);
      if (from >= 0) read_head(tile, h * m, m, b, from);
    }
  };
  for_each_decode_item<T, true>(p.decode, blocks, begin, end, read);
}

}  // namespace

void memory_decode_coded(const M3MemoryDecodeCodedParams& p, const RowBlocks& blocks, int64_t begin, int64_t end) {
  with_dtype(p.decode.dtype, [&](auto tag) { attend<decltype(tag)>(p, blocks, begin, end); });
}

}  // namespace M3_LEVEL
}  // namespace m3
