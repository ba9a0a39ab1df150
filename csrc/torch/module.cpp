// Loaded once by memory3_kernels/_load.py: lets the core's ranges run on torch's own threads.
#include <torch/csrc/stable/ops.h>

#include <cstring>

#include "m3/api.h"
#include "torch/direct.h"

namespace {

void run_on_torch_threads(int64_t n, int64_t grain, m3_range_fn body, void* context) {
  torch::stable::parallel_for(0, n, grain, [=](int64_t begin, int64_t end) { body(context, begin, end); });
}

[[maybe_unused]] const bool installed = (m3_set_parallel(&run_on_torch_threads), true);

}  // namespace

namespace m3::binding {

std::vector<direct::Op>& direct_ops() {
  static std::vector<direct::Op> ops;
  return ops;
}

}  // namespace m3::binding

// For csrc/python/direct.cpp; null for a name that is not an op.
extern "C" __attribute__((visibility("default"))) const m3::direct::Op* m3_direct_op(const char* name) {
  for (const m3::direct::Op& op : m3::binding::direct_ops())
    if (std::strcmp(op.name, name) == 0) return &op;
  return nullptr;
}
