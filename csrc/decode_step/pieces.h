// What a step does between its linear maps and attention, per SIMD level.
#pragma once

#include <stdint.h>

#include "m3/api.h"

namespace m3 {

// Rows [count, cols] of x (fp32, contiguous), normalised, times weight, as bf16; sums per 32 columns where wanted.
struct NormRows {
  const float* x;
  const float* weight;
  int64_t count, cols;
  float eps;
  uint16_t* out;
  float* sums;
};

// silu(gate) * up for columns [begin, end) (multiples of 32) of rows [count, stride]; bf16 out and sums [count, cols].
struct GateRows {
  const float* gate;
  const float* up;
  int64_t count, stride, cols;
  uint16_t* out;
  float* sums;
};

// `heads` vectors of `dim` at x, rotated, as bf16.
struct RotateRow {
  const float* x;
  int64_t heads, dim;
  const float* cos;
  const float* sin;
  uint16_t* out;
};

// to += from for rows [count, cols], each at its own pitch.
struct AddRows {
  const float* from;
  int64_t from_pitch, count, cols;
  float* to;
  int64_t to_pitch;
};

}  // namespace m3
