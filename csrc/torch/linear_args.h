// What the bindings of linear maps on tiles of 16 rows share.
#pragma once

#include <string>
#include <vector>

#include "m3/packed_linear.h"
#include "torch/tensor_args.h"

namespace m3::binding {

inline int64_t columns_of(const Tensor& x) {
  STD_TORCH_CHECK(x.dim() > 0, "x: expected [..., cols], got a number");
  return x.size(x.dim() - 1);
}

inline m3_activations activations_by_name(const std::string& name) {
  if (name == "bf16") return M3_ACTIVATIONS_BF16;
  STD_TORCH_CHECK(name == "mxint8", "activations: expected bf16 or mxint8, got ", name);
  return M3_ACTIVATIONS_MXINT8;
}

// kind: what the message says behind the shape.
inline void expect_tiles(const Tensor& weight, int64_t tiles, int64_t bytes, int64_t rows, int64_t cols,
                         const std::string& kind = "") {
  STD_TORCH_CHECK(weight.dim() == 2 && weight.size(0) == tiles && weight.size(1) == bytes, "weight: expected shape [",
                  tiles, ", ", bytes, "] for ", rows, " rows of ", cols, kind, ", got ", shape_of(weight));
}

// Shape of the result, and the rows that x has.
inline std::vector<int64_t> result_shape(const Tensor& x, int64_t rows, int64_t* count) {
  std::vector<int64_t> shape;
  *count = 1;
  for (int64_t d = 0; d + 1 < x.dim(); ++d) shape.push_back(x.size(d)), *count *= x.size(d);
  shape.push_back(rows);
  return shape;
}

}  // namespace m3::binding
