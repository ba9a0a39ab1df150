// Element by element work of a step; the linear maps and attention are other ops' kernels.
#include "common/vec.h"
#include "decode_step/pieces.h"
#include "packed_linear/round.h"

namespace m3 {
namespace M3_LEVEL {
namespace {

constexpr int kBlock = M3_PACKED_COLS;

inline BF16* as_bf16(uint16_t* p) { return reinterpret_cast<BF16*>(p); }

float sum_of_squares(const float* x, int64_t n) {
  F32 a = {}, b = {};
  int64_t i = 0;
  for (; i + 2 * kLanes <= n; i += 2 * kLanes) {
    const F32 v = load(x + i), w = load(x + i + kLanes);
    a += v * v;
    b += w * w;
  }
  return sum(a + b);  // n is a multiple of 32
}

}  // namespace

void step_norm(const NormRows& p) {
  const int64_t cols = p.out.cols;
  for (int64_t m = 0; m < p.count; ++m) {
    const float* x = p.x + m * cols;
    const float factor = 1.f / __builtin_sqrtf(sum_of_squares(x, cols) / static_cast<float>(cols) + p.eps);
    for (int64_t c = 0; c < cols; c += kBlock) {
      F32 v[kBlockParts];
      for (int i = 0; i < kBlockParts; ++i) {
        const int64_t at = c + i * kLanes;
        v[i] = load(x + at) * factor * load(p.weight + at);
      }
      store_block(p.out, p.row + m, c / kBlock, v);
    }
  }
}

void step_gate(const GateRows& p, int64_t begin, int64_t end) {
  for (int64_t m = 0; m < p.count; ++m)
    for (int64_t c = begin; c < end; c += kBlock) {
      F32 v[kBlockParts];
      for (int i = 0; i < kBlockParts; ++i) {
        const int64_t at = m * p.stride + c + i * kLanes;
        const F32 gate = load(p.gate + at), up = load(p.up + at);
        // Below -80, where exp would soon overflow, the quotient is 0 but for its last bits.
        const F32 silu = gate / (1.f + exp(-max(gate, splat(-80.f))));
        v[i] = silu * up;
      }
      store_block(p.out, p.row + m, (p.col + c) / kBlock, v);
    }
}

void step_rotate(const RotateRow& p) {
  const int64_t half = p.dim / 2;
  for (int64_t h = 0; h < p.heads; ++h) {
    const float* x = p.x + h * p.dim;
    uint16_t* out = p.out + h * p.dim;
    if (half % kLanes == 0) {
      for (int64_t i = 0; i < half; i += kLanes) {
        const F32 low = load(x + i), high = load(x + half + i);
        store(as_bf16(out + i), low * load(p.cos + i) + high * load(p.sin + i));
        store(as_bf16(out + half + i), high * load(p.cos + half + i) + low * load(p.sin + half + i));
      }
    } else {
      for (int64_t i = 0; i < half; ++i) {
        from_float(x[i] * p.cos[i] + x[half + i] * p.sin[i], as_bf16(out + i));
        from_float(x[half + i] * p.cos[half + i] + x[i] * p.sin[half + i], as_bf16(out + half + i));
      }
    }
  }
}

// bf16 out = x, n a multiple of 8.
void step_round(const float* x, int64_t n, uint16_t* out) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(as_bf16(out + i), load(x + i));
  if (i < n) store_half(as_bf16(out + i), load_half(x + i));
}

// out = x, n a multiple of 32.
void step_widen(const uint16_t* x, int64_t n, float* out) {
  for (int64_t i = 0; i < n; i += kLanes) store(out + i, load(reinterpret_cast<const BF16*>(x + i)));
}

void step_add(const AddRows& p) {
  for (int64_t m = 0; m < p.count; ++m)
    for (int64_t c = 0; c < p.cols; ++c) p.to[m * p.to_pitch + c] += p.from[m * p.from_pitch + c];
}

}  // namespace M3_LEVEL
}  // namespace m3
