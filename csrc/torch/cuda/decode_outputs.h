// The outputs of memory_decode and memory_decode_coded on the device of their arguments.
#pragma once

#include "torch/cuda/device.h"
#include "torch/memory_decode_args.h"

namespace m3::binding {

// out, lse, mass; call after the records are set.
inline std::tuple<Tensor, Tensor, Tensor> decode_outputs_beside(M3MemoryDecodeParams& p, const Tensor& q) {
  Tensor out = empty_beside(q, {p.rows, p.heads, p.dim}, q.scalar_type());
  Tensor lse = empty_beside(q, {p.rows, p.heads}, ScalarType::Float);
  Tensor mass = empty_beside(q, {p.rows, p.heads, p.memory.refs}, ScalarType::Float);
  p.out = out.mutable_data_ptr();
  p.lse = lse.mutable_data_ptr<float>();
  p.mass = mass.mutable_data_ptr<float>();
  return {std::move(out), std::move(lse), std::move(mass)};
}

}  // namespace m3::binding
