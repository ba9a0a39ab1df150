#include "m3/packed_linear.h"

#include "torch/linear_args.h"

namespace m3::binding {
namespace {

m3_weight_format format_by_name(const std::string& name) {
  if (name == "bf16") return M3_WEIGHT_BF16;
  if (name == "q8_0") return M3_WEIGHT_Q8_0;
  STD_TORCH_CHECK(name == "q4_1", "format: expected one of bf16, q8_0, q4_1, got ", name);
  return M3_WEIGHT_Q4_1;
}

Tensor packed_linear(const Tensor& x, const Tensor& weight, std::string format, std::string activations, int64_t rows,
                     ScalarType out_dtype) {
  M3PackedLinearParams p{};
  p.weight.format = format_by_name(format);
  p.activations = activations_by_name(activations);
  STD_TORCH_CHECK(p.activations == M3_ACTIVATIONS_BF16 || p.weight.format != M3_WEIGHT_BF16,
                  "activations: expected bf16 for weights in bf16, got ", activations);
  p.out_dtype = output_type(out_dtype, "out_dtype");
  const int64_t cols = columns_of(x);
  const m3_dtype type = element_type(x, "x");
  STD_TORCH_CHECK(cols % M3_PACKED_COLS == 0, "x: expected a multiple of ", M3_PACKED_COLS, " columns, got ", cols);
  STD_TORCH_CHECK(rows >= 0, "rows: expected 0 or more, got ", rows);
  p.weight.rows = rows, p.weight.cols = cols;
  expect_type(weight, "weight", ScalarType::Byte);
  const int64_t tiles = m3_packed_tiles(&p.weight), bytes = m3_packed_tile_bytes(&p.weight);
  expect_tiles(weight, tiles, bytes, rows, cols, " in " + format);
  const Tensor packed = as_contiguous(weight), rows_of_x = as_contiguous(x);
  Tensor out = empty_cpu(result_shape(x, rows, &p.count), out_dtype);
  p.weight.data = packed.const_data_ptr<uint8_t>();
  p.out = out.mutable_data_ptr();
  p.x_stride = cols, p.out_stride = rows;
  p.x = static_cast<const uint16_t*>(rows_of_x.const_data_ptr());
  // Rows that are bf16 already are read where they lie; q4_1 needs their sums all the same.
  const bool scale = p.activations == M3_ACTIVATIONS_MXINT8, add = scale || p.weight.format == M3_WEIGHT_Q4_1;
  Tensor rounded, sums;
  if (type != M3_BF16 || add) {
    const int64_t blocks = p.count * (cols / M3_PACKED_COLS);
    rounded = empty_cpu({p.count, cols}, ScalarType::BFloat16);
    M3PackedRows to{};
    to.activations = p.activations, to.format = p.weight.format, to.cols = cols;
    to.x = static_cast<uint16_t*>(rounded.mutable_data_ptr());
    if (add) {
      sums = empty_cpu({scale ? 2 * blocks : blocks}, ScalarType::Float);
      to.sums = sums.mutable_data_ptr<float>();
      if (scale) to.scales = to.sums + blocks;
    }
    p.x = to.x, p.sums = to.sums, p.scales = to.scales;
    check(m3_pack_activations(rows_of_x.const_data_ptr(), type, cols, p.count, &to));
  }
  check(m3_packed_linear_cpu(&p));
  return out;
}

}  // namespace
}  // namespace m3::binding

M3_REGISTER_CPU(packed_linear, m3::binding::packed_linear)
