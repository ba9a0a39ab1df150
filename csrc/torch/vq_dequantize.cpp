#include "torch/vq_dequantize_args.h"

namespace m3::binding {
namespace {

Tensor vq_dequantize(const Tensor& codes, const Tensor& coarse, const Tensor& fine, const std::optional<Tensor>& rot,
                     ScalarType dtype) {
  VqArgs args(codes, coarse, fine, rot, dtype);
  Tensor out = empty_cpu(args.shape, dtype);
  args.params.out = out.mutable_data_ptr();
  check(m3_vq_dequantize_cpu(&args.params));
  return out;
}

}  // namespace
}  // namespace m3::binding

M3_REGISTER_CPU(vq_dequantize, m3::binding::vq_dequantize)
