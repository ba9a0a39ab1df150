#include "torch/cuda/values.h"
#include "torch/gather_dequantize_args.h"

namespace m3::binding {
namespace {

Tensor gather_dequantize_cuda(const Tensor& codes, const Tensor& slots, const Tensor& coarse, const Tensor& fine,
                              const std::optional<Tensor>& rot, int64_t tokens, ScalarType dtype) {
  GatherCodesArgs args(codes, slots, coarse, fine, rot, tokens, dtype);
  M3GatherDequantizeParams& p = args.params;
  check_values(args.slots, "slots", -1, p.slots - 1);
  Tensor out = empty_beside(codes, {p.records, p.heads, tokens, p.book.dim}, dtype);
  p.out = out.mutable_data_ptr();
  check_cuda(m3_gather_dequantize_cuda(&p, current_stream(codes)));
  return out;
}

}  // namespace
}  // namespace m3::binding

M3_REGISTER_CUDA(gather_dequantize, gather_dequantize_cuda)
