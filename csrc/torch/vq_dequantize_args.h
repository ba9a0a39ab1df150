// The arguments of vq_dequantize, checked, as its launchers take them.
#pragma once

#include <vector>

#include "m3/vq_dequantize.h"
#include "torch/book_args.h"

namespace m3::binding {

// Keeps alive what `params` points into: everything but the result.
struct VqArgs {
  BookArgs book;
  Tensor rows;
  std::vector<int64_t> shape;  // of the result
  M3VqDequantizeParams params{};

  VqArgs(const Tensor& codes, const Tensor& coarse, const Tensor& fine, const std::optional<Tensor>& rot,
         ScalarType dtype)
      : book(book_args(coarse, fine, rot)) {
    M3VqDequantizeParams& p = params;
    p.dtype = output_type(dtype);
    expect_type(codes, "codes", ScalarType::Byte);
    const int64_t width = m3_book_code_bytes(&book.view), lead = codes.dim() - 1;
    if (lead < 0) expect_shape(codes, "codes", {width});
    expect_unit_stride(codes, "codes");
    STD_TORCH_CHECK(codes.size(lead) == width, "codes: expected ", width,
                    " bytes per vector (the last dimension), got ", codes.size(lead));
    p.vectors = 1;
    for (int64_t d = 0; d < lead; ++d) shape.push_back(codes.size(d)), p.vectors *= codes.size(d);
    shape.push_back(book.view.dim);
    // Rows at one distance are read in place, anything else from a packed copy (a small part of what is written).
    rows = lead <= 1 ? codes.borrow() : as_contiguous(codes);
    p.book = book.view;
    p.codes = rows.const_data_ptr<uint8_t>();
    p.code_stride = lead == 1 ? codes.stride(0) : width;
  }
};

}  // namespace m3::binding
