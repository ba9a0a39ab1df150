#include "torch/cuda/values.h"
#include "torch/scatter_memory_args.h"

namespace m3::binding {
namespace {

void scatter_memory_cuda(Tensor arena, const Tensor& records, const Tensor& slots) {
  const ScatterArgs args(arena, records, slots);
  check_values(args.slots, "slots", -1, args.params.slots - 1);
  check_cuda(m3_scatter_memory_cuda(&args.params, current_stream(arena)));
}

}  // namespace
}  // namespace m3::binding

M3_REGISTER_CUDA(scatter_memory, scatter_memory_cuda)
