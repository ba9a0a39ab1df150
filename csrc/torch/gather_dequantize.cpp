#include "torch/gather_dequantize_args.h"

namespace m3::binding {
namespace {

Tensor gather_dequantize(const Tensor& codes, const Tensor& slots, const Tensor& coarse, const Tensor& fine,
                         const std::optional<Tensor>& rot, int64_t tokens, ScalarType dtype) {
  GatherCodesArgs args(codes, slots, coarse, fine, rot, tokens, dtype);
  M3GatherDequantizeParams& p = args.params;
  Tensor out = empty_cpu({p.records, p.heads, tokens, p.book.dim}, dtype);
  p.out = out.mutable_data_ptr();
  check(m3_gather_dequantize_cpu(&p));
  return out;
}

}  // namespace
}  // namespace m3::binding

M3_REGISTER_CPU(gather_dequantize, m3::binding::gather_dequantize)
