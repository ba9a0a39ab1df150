// The arguments of memory_decode_coded, checked, as its launchers take them.
#pragma once

#include "m3/memory_decode_coded.h"
#include "torch/book_args.h"
#include "torch/memory_decode_args.h"

namespace m3::binding {

// Codes of one side: the arena's [S, Hm, G] bytes, each record head holding `tokens` codes of `book`.
inline const uint8_t* codes_of(const Tensor& codes, const char* name, const M3Book& book, int64_t slots, int64_t heads,
                               int64_t tokens, int64_t* stride) {
  expect_type(codes, name, ScalarType::Byte);
  expect_shape(codes, name, {slots, heads, m3_book_record_bytes(&book, tokens)});
  expect_unit_stride(codes, name);
  copy_strides(codes, stride, 2);
  return codes.const_data_ptr<uint8_t>();
}

// Keeps alive what `params` points into.
struct CodedDecodeArgs {
  DecodeArgs decode;
  BookArgs k_book, v_book;
  M3MemoryDecodeCodedParams params{};

  // Everything but the outputs.
  CodedDecodeArgs(const Tensor& q, const Tensor& k_cache, const Tensor& v_cache, const Tensor& kv_len,
                  const MaybeTensor& block_table, const Tensor& cu_q, const Tensor& mem_k_codes,
                  const Tensor& mem_v_codes, const Tensor& mem_slot, const Tensor& mem_len, const MaybeTensor& mem_bias,
                  const MaybeTensor& head_map, const Tensor& k_coarse, const Tensor& k_fine, const MaybeTensor& k_rot,
                  const Tensor& v_coarse, const Tensor& v_fine, const MaybeTensor& v_rot, int64_t tokens, double scale,
                  int64_t max_q, int64_t max_kv) {
    M3MemoryDecodeCodedParams& p = params;
    p.decode = decode_args(decode, q, k_cache, v_cache, kv_len, block_table, cu_q, scale, max_q, max_kv);
    k_book = book_args(k_coarse, k_fine, k_rot, "k_"), v_book = book_args(v_coarse, v_fine, v_rot, "v_");
    p.k_book = k_book.view, p.v_book = v_book.view;
    STD_TORCH_CHECK(p.k_book.dim == p.decode.dim, "k_coarse: expected codes of vectors of length ", p.decode.dim,
                    ", got ", p.k_book.dim);
    STD_TORCH_CHECK(p.v_book.dim == p.decode.dim, "v_coarse: expected codes of vectors of length ", p.decode.dim,
                    ", got ", p.v_book.dim);
    STD_TORCH_CHECK(tokens > 0, "tokens: expected at least 1, got ", tokens);
    expect_shape(mem_k_codes, "mem_k_codes", {-1, -1, -1});
    const int64_t slots = mem_k_codes.size(0), heads = mem_k_codes.size(1);
    p.k_codes = codes_of(mem_k_codes, "mem_k_codes", p.k_book, slots, heads, tokens, p.k_code_stride);
    p.v_codes = codes_of(mem_v_codes, "mem_v_codes", p.v_book, slots, heads, tokens, p.v_code_stride);
    record_indices(decode.records, mem_slot, mem_len, mem_bias, head_map, p.decode.sequences, slots, heads, tokens,
                   p.decode.kv_heads);
    check_heads(q, p.decode.kv_heads);
    p.decode.memory = decode.records.view;
  }
};

}  // namespace m3::binding
