#include "torch/cuda/values.h"
#include "torch/gather_memory_args.h"

namespace m3::binding {
namespace {

Tensor gather_memory_cuda(const Tensor& k, const Tensor& v, const Tensor& index) {
  GatherArgs args(k, v, index);
  M3GatherMemoryParams& p = args.params;
  check_values(args.index, "index", -1, p.rows - 1);
  Tensor kv = empty_beside(k, {p.refs, 2, p.heads, p.tokens, p.dim}, k.scalar_type());
  p.kv = kv.mutable_data_ptr();
  check_cuda(m3_gather_memory_cuda(&p, current_stream(k)));
  return kv;
}

}  // namespace
}  // namespace m3::binding

M3_REGISTER_CUDA(gather_memory, gather_memory_cuda)
