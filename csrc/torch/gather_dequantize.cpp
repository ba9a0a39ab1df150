#include "m3/gather_dequantize.h"

#include "torch/book_args.h"

namespace m3::binding {
namespace {

Tensor gather_dequantize(const Tensor& codes, const Tensor& slots, const Tensor& coarse, const Tensor& fine,
                         const std::optional<Tensor>& rot, int64_t tokens, ScalarType dtype) {
  const BookArgs book = book_args(coarse, fine, rot);
  M3GatherDequantizeParams p{};
  p.dtype = output_type(dtype);
  STD_TORCH_CHECK(tokens > 0, "tokens: expected at least 1, got ", tokens);
  expect_type(codes, "codes", ScalarType::Byte);
  expect_unit_stride(codes, "codes");
  expect_shape(codes, "codes", {-1, -1, m3_book_record_bytes(&book.view, tokens)});
  expect_shape(slots, "slots", {-1});
  expect_type(slots, "slots", ScalarType::Int);
  const Tensor slot = as_contiguous(slots);
  p.slots = codes.size(0), p.heads = codes.size(1), p.records = slots.size(0), p.tokens = tokens;
  Tensor out = empty_cpu({p.records, p.heads, tokens, book.view.dim}, dtype);
  p.book = book.view;
  p.codes = codes.const_data_ptr<uint8_t>(), p.slot = slot.const_data_ptr<int32_t>();
  p.out = out.mutable_data_ptr();
  p.code_stride[0] = codes.stride(0), p.code_stride[1] = codes.stride(1);
  check(m3_gather_dequantize_cpu(&p));
  return out;
}

}  // namespace
}  // namespace m3::binding

M3_REGISTER_CPU(gather_dequantize, m3::binding::gather_dequantize)
