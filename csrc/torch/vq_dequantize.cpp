#include "m3/vq_dequantize.h"

#include <vector>

#include "torch/book_args.h"

namespace m3::binding {
namespace {

Tensor vq_dequantize(const Tensor& codes, const Tensor& coarse, const Tensor& fine, const std::optional<Tensor>& rot,
                     ScalarType dtype) {
  const BookArgs book = book_args(coarse, fine, rot);
  M3VqDequantizeParams p{};
  p.dtype = output_type(dtype);
  expect_type(codes, "codes", ScalarType::Byte);
  const int64_t width = m3_book_code_bytes(&book.view), lead = codes.dim() - 1;
  if (lead < 0) expect_shape(codes, "codes", {width});
  expect_unit_stride(codes, "codes");
  STD_TORCH_CHECK(codes.size(lead) == width, "codes: expected ", width,
                  " bytes per vector (the last dimension), got ", codes.size(lead));
  std::vector<int64_t> shape;
  p.vectors = 1;
  for (int64_t d = 0; d < lead; ++d) shape.push_back(codes.size(d)), p.vectors *= codes.size(d);
  shape.push_back(book.view.dim);
  // Rows at one distance are read in place, anything else from a packed copy (a small part of what is written).
  const Tensor rows = lead <= 1 ? codes : as_contiguous(codes);
  Tensor out = empty_cpu(shape, dtype);
  p.book = book.view;
  p.codes = rows.const_data_ptr<uint8_t>(), p.out = out.mutable_data_ptr();
  p.code_stride = lead == 1 ? codes.stride(0) : width;
  check(m3_vq_dequantize_cpu(&p));
  return out;
}

}  // namespace
}  // namespace m3::binding

M3_REGISTER_CPU(vq_dequantize, m3::binding::vq_dequantize)
