// Loaded once by memory3_kernels/_load.py: lets the core's ranges run on torch's own threads.
#include <torch/csrc/stable/ops.h>

#include "m3/api.h"

namespace {

void run_on_torch_threads(int64_t n, int64_t grain, m3_range_fn body, void* context) {
  torch::stable::parallel_for(0, n, grain, [=](int64_t begin, int64_t end) { body(context, begin, end); });
}

[[maybe_unused]] const bool installed = (m3_set_parallel(&run_on_torch_threads), true);

}  // namespace
