#include "torch/gather_memory_args.h"

namespace m3::binding {
namespace {

Tensor gather_memory(const Tensor& k, const Tensor& v, const Tensor& index) {
  GatherArgs args(k, v, index);
  M3GatherMemoryParams& p = args.params;
  Tensor kv = empty_cpu({p.refs, 2, p.heads, p.tokens, p.dim}, k.scalar_type());
  p.kv = kv.mutable_data_ptr();
  check(m3_gather_memory_cpu(&p));
  return kv;
}

}  // namespace
}  // namespace m3::binding

M3_REGISTER_CPU(gather_memory, m3::binding::gather_memory)
