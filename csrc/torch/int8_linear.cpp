#include "m3/int8_linear.h"

#include "torch/linear_args.h"

namespace m3::binding {
namespace {

Tensor int8_linear(const Tensor& x, const Tensor& weight, int64_t rows, bool gelu, ScalarType out_dtype) {
  M3Int8LinearParams p{};
  p.out_dtype = output_type(out_dtype, "out_dtype");
  const int64_t cols = columns_of(x);
  p.x_dtype = element_type(x, "x");
  STD_TORCH_CHECK(rows >= 0, "rows: expected 0 or more, got ", rows);
  p.weight.rows = rows, p.weight.cols = cols;
  expect_type(weight, "weight", ScalarType::Byte);
  const int64_t tiles = m3_int8_tiles(&p.weight), bytes = m3_int8_tile_bytes(&p.weight);
  expect_tiles(weight, tiles, bytes, rows, cols);
  const Tensor packed = as_contiguous(weight), rows_of_x = as_contiguous(x);
  Tensor out = empty_cpu(result_shape(x, rows, &p.count), out_dtype);
  p.weight.data = packed.const_data_ptr<uint8_t>();
  p.x = rows_of_x.const_data_ptr();
  p.out = out.mutable_data_ptr();
  p.x_stride = cols, p.out_stride = rows, p.gelu = gelu;
  const Tensor workspace = empty_cpu({m3_int8_linear_workspace(&p)}, ScalarType::Byte);
  p.workspace = const_cast<void*>(workspace.const_data_ptr());
  check(m3_int8_linear_cpu(&p));
  return out;
}

}  // namespace
}  // namespace m3::binding

M3_REGISTER_CPU(int8_linear, m3::binding::int8_linear)
