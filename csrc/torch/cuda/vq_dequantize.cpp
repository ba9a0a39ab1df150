#include "torch/cuda/device.h"
#include "torch/vq_dequantize_args.h"

namespace m3::binding {
namespace {

Tensor vq_dequantize_cuda(const Tensor& codes, const Tensor& coarse, const Tensor& fine,
                          const std::optional<Tensor>& rot, ScalarType dtype) {
  VqArgs args(codes, coarse, fine, rot, dtype);
  Tensor out = empty_beside(codes, args.shape, dtype);
  args.params.out = out.mutable_data_ptr();
  check_cuda(m3_vq_dequantize_cuda(&args.params, current_stream(codes)));
  return out;
}

}  // namespace
}  // namespace m3::binding

M3_REGISTER_CUDA(vq_dequantize, vq_dequantize_cuda)
