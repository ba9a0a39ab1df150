#include "torch/scatter_memory_args.h"

namespace m3::binding {
namespace {

void scatter_memory(Tensor arena, const Tensor& records, const Tensor& slots) {
  const ScatterArgs args(arena, records, slots);
  check(m3_scatter_memory_cpu(&args.params));
}

}  // namespace
}  // namespace m3::binding

M3_REGISTER_CPU(scatter_memory, m3::binding::scatter_memory)
