// M3_DEBUG=1: values of index tensors are copied to the host and refused where they are out of range, as on the CPU.
// Otherwise nobody looks at them there, and kernels take a bad one as absent.
#pragma once

#include <cstdlib>
#include <cstring>

#include "torch/cuda/device.h"

namespace m3::binding {

inline bool checks_values() {
  const char* set = std::getenv("M3_DEBUG");
  return set != nullptr && std::strcmp(set, "1") == 0;
}

// int32, contiguous. Waits for the device; not for graph capture.
inline void check_values(const Tensor& t, const char* name, int64_t low, int64_t high) {
  if (!checks_values()) return;
  const Tensor here(torch::stable::to(t, torch::stable::Device(torch::headeronly::DeviceType::CPU)));
  const int32_t* value = here.const_data_ptr<int32_t>();
  for (int64_t i = 0; i < here.numel(); ++i) {
    if (value[i] >= low && value[i] <= high) continue;
    std::string place;
    for (int64_t d = here.dim() - 1, left = i; d >= 0; left /= here.size(d--))
      place = std::to_string(left % here.size(d)) + (place.empty() ? "" : ", ") + place;
    STD_TORCH_CHECK(false, name, "[", place, "]: expected ", low, "..", high, ", got ", value[i]);
  }
}

}  // namespace m3::binding
