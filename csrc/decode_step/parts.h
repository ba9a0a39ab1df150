// What both ways through a decoder share: one_token.cpp (latency: a token per sequence) and prompt.cpp (throughput: many).
#pragma once

#include <time.h>

#include "common/simd.h"
#include "common/team.h"
#include "decode_step/pieces.h"
#include "m3/decode_step.h"

M3_DECLARE_LEVELS(void, packed_linear, const M3PackedLinearParams&, int64_t, int64_t)
M3_DECLARE_LEVELS(void, pack_activations, const void*, m3_dtype, int64_t, int64_t, const M3PackedRows&, int64_t)
M3_DECLARE_LEVELS(void, step_norm, const NormRows&)
M3_DECLARE_LEVELS(void, step_gate, const GateRows&, int64_t, int64_t)
M3_DECLARE_LEVELS(void, step_rotate, const RotateRow&)
M3_DECLARE_LEVELS(void, step_round, const float*, int64_t, uint16_t*)
M3_DECLARE_LEVELS(void, step_widen, const uint16_t*, int64_t, float*)
M3_DECLARE_LEVELS(void, step_add, const AddRows&)

namespace m3 {

// Bytes of workspace, and the work itself, of checked arguments.
int64_t one_token_workspace(const M3DecodeStepParams& p);
void one_token(const M3DecodeStepParams& p);
int64_t prompt_workspace(const M3DecodeStepParams& p);
void prompt(const M3DecodeStepParams& p);

// Cuts buffers from one workspace, 64 bytes aligned; with a null base only `bytes` is meaningful.
struct Cutter {
  char* base;
  int64_t bytes = 0;

  template <class T>
  void operator()(T*& pointer, int64_t count) {
    pointer = reinterpret_cast<T*>(base + bytes);
    bytes += (count * static_cast<int64_t>(sizeof(T)) + 63) / 64 * 64;
  }
};

// Room for the input of linear maps of up to `cols` columns.
inline void take_rows(Cutter& take, M3PackedRows& rows, int64_t count, int64_t cols) {
  take(rows.x, count * cols);
  take(rows.sums, count * cols / M3_PACKED_COLS);
  take(rows.scales, count * cols / M3_PACKED_COLS);
}

// That room, for rows that will meet `weight`.
inline M3PackedRows rows_for(const M3DecodeStepParams& p, const M3PackedWeight& weight, M3PackedRows rows) {
  rows.activations = weight.format == M3_WEIGHT_BF16 ? M3_ACTIVATIONS_BF16 : p.activations;
  rows.format = weight.format, rows.cols = weight.cols;
  return rows;
}

// count rows of x times the weight they were made for; out [count, rows of the weight] fp32.
inline M3PackedLinearParams linear_of(const M3PackedWeight& weight, const M3PackedRows& x, int64_t count, float* out) {
  return {weight, x.x, weight.cols, x.sums, x.scales, x.activations, nullptr, 0, count, out, M3_F32, weight.rows};
}

// The records of memory layer `memory`.
inline M3Records records_of(const M3DecodeStepParams& p, int64_t memory) {
  M3Records records = p.memory;
  records.k = static_cast<const uint16_t*>(records.k) + memory * p.memory_stride;
  records.v = static_cast<const uint16_t*>(records.v) + memory * p.memory_stride;
  if (records.bias != nullptr) records.bias += memory * p.bias_stride;
  if (records.head_map != nullptr) records.head_map += memory * p.kv_heads;
  return records;
}

// Adds the time since the last call to a stage; nothing without a profile.
class Watch {
 public:
  explicit Watch(int64_t* stages) : stages_(stages), last_(stages ? now() : 0) {}

  void mark(int stage) {
    if (stages_ == nullptr) return;
    const int64_t t = now();
    stages_[stage] += t - last_;
    last_ = t;
  }

 private:
  static int64_t now() {
    timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return int64_t{t.tv_sec} * 1000000000 + t.tv_nsec;
  }

  int64_t* stages_;
  int64_t last_;
};

}  // namespace m3
