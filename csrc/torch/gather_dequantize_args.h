// The arguments of gather_dequantize, checked, as its launchers take them.
#pragma once

#include "m3/gather_dequantize.h"
#include "torch/book_args.h"

namespace m3::binding {

// Keeps alive what `params` points into: everything but the result.
struct GatherCodesArgs {
  BookArgs book;
  Tensor slots;
  M3GatherDequantizeParams params{};

  GatherCodesArgs(const Tensor& codes, const Tensor& slot, const Tensor& coarse, const Tensor& fine,
                  const std::optional<Tensor>& rot, int64_t tokens, ScalarType dtype)
      : book(book_args(coarse, fine, rot)) {
    M3GatherDequantizeParams& p = params;
    p.dtype = output_type(dtype);
    STD_TORCH_CHECK(tokens > 0, "tokens: expected at least 1, got ", tokens);
    expect_type(codes, "codes", ScalarType::Byte);
    expect_unit_stride(codes, "codes");
    expect_shape(codes, "codes", {-1, -1, m3_book_record_bytes(&book.view, tokens)});
    expect_shape(slot, "slots", {-1});
    expect_type(slot, "slots", ScalarType::Int);
    slots = as_contiguous(slot);
    p.slots = codes.size(0), p.heads = codes.size(1), p.records = slots.size(0), p.tokens = tokens;
    p.book = book.view;
    p.codes = codes.const_data_ptr<uint8_t>(), p.slot = slots.const_data_ptr<int32_t>();
    p.code_stride[0] = codes.stride(0), p.code_stride[1] = codes.stride(1);
  }
};

}  // namespace m3::binding
