// What a step does between its linear maps and attention, per SIMD level.
#pragma once

#include <stdint.h>

#include "m3/packed_linear.h"

namespace m3 {

// Rows [count, out.cols] of x (fp32, contiguous), normalised, times weight, become rows of `out` from `row` on.
struct NormRows {
  const float* x;
  const float* weight;
  int64_t count;
  float eps;
  M3PackedRows out;
  int64_t row;
};

// silu(gate) * up for columns [begin, end) (multiples of 32) of rows [count, stride] become columns [col + begin, ..) of
// rows of `out` from `row` on.
struct GateRows {
  const float* gate;
  const float* up;
  int64_t count, stride;
  M3PackedRows out;
  int64_t row, col;
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
