// The instructions kernels are written in: a thin layer over PTX, which tests/simt/simt_device.h replaces to run the
// same kernels on a CPU. Register layouts of load_matrices and mma: PTX ISA, "Matrix Fragments for mma.m16n8k16".
#pragma once

#include <cstddef>
#include <cstdint>

#if !defined(__CUDACC__)
#include "simt_device.h"
#else

#define M3_KERNEL __global__
#define M3_DEVICE __device__ __forceinline__
#define M3_THREADS(...) __launch_bounds__(__VA_ARGS__)
#define M3_UNROLL _Pragma("unroll")
// Before a loop whose addresses, unrolled, would take more registers than they save.
#define M3_ROLLED _Pragma("unroll 1")

namespace m3::gpu {

constexpr uint32_t kAllLanes = 0xFFFFFFFFu;

M3_DEVICE int thread_index() { return static_cast<int>(threadIdx.x); }
M3_DEVICE int64_t block_index() { return blockIdx.x; }
M3_DEVICE int64_t grid_size() { return gridDim.x; }
M3_DEVICE int lane_index() { return static_cast<int>(threadIdx.x % 32); }
M3_DEVICE int warp_index() { return static_cast<int>(threadIdx.x / 32); }
M3_DEVICE char* shared_memory() {
  extern __shared__ __align__(128) char m3_shared[];
  return m3_shared;
}

M3_DEVICE void sync_block() { __syncthreads(); }
M3_DEVICE void sync_warp() { __syncwarp(); }

template <class T>
M3_DEVICE T shuffle(T value, int lane) {
  return __shfl_sync(kAllLanes, value, lane);
}
template <class T>
M3_DEVICE T shuffle_xor(T value, int mask) {
  return __shfl_xor_sync(kAllLanes, value, mask);
}
M3_DEVICE uint32_t ballot(bool set) { return __ballot_sync(kAllLanes, set); }

M3_DEVICE uint32_t shared_address(const void* shared) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
}

// 16 bytes to shared memory, past the registers and the first-level cache; zeros, and nothing read, if not `present`.
M3_DEVICE void copy_async16(void* shared, const void* global, bool present) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(shared_address(shared)), "l"(global),
               "r"(present ? 16 : 0)
               : "memory");
}
M3_DEVICE void commit_copies() { asm volatile("cp.async.commit_group;\n"); }
// Until at most `GroupsLeft` of this thread's groups are under way.
template <int GroupsLeft>
M3_DEVICE void wait_copies() {
  asm volatile("cp.async.wait_group %0;\n" ::"n"(GroupsLeft) : "memory");
}

// Four 8x8 matrices of 16-bit elements: lane i names row i % 8 of matrix i / 8.
M3_DEVICE void load_matrices(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];\n"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}
M3_DEVICE void load_matrices_transposed(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];\n"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

// 8 and 16 bytes at once; addresses are multiples of that.
M3_DEVICE void store8(void* to, uint32_t a, uint32_t b) { *static_cast<uint2*>(to) = make_uint2(a, b); }
M3_DEVICE void store16(float* to, const float (&x)[4]) {
  *reinterpret_cast<float4*>(to) = make_float4(x[0], x[1], x[2], x[3]);
}
// The same as words, in one piece whatever the compiler knows of the address: nvcc 13 takes some stores apart.
M3_DEVICE void store_words_global(void* to, const uint32_t (&w)[4]) {
  asm volatile("st.global.v4.b32 [%0], {%1,%2,%3,%4};\n" ::"l"(__cvta_generic_to_global(to)), "r"(w[0]), "r"(w[1]),
               "r"(w[2]), "r"(w[3])
               : "memory");
}
M3_DEVICE void store_words_global(void* to, const uint32_t (&w)[2]) {
  asm volatile("st.global.v2.b32 [%0], {%1,%2};\n" ::"l"(__cvta_generic_to_global(to)), "r"(w[0]), "r"(w[1])
               : "memory");
}
M3_DEVICE void store_words_shared(void* to, const uint32_t (&w)[4]) {
  asm volatile("st.shared.v4.b32 [%0], {%1,%2,%3,%4};\n" ::"r"(shared_address(to)), "r"(w[0]), "r"(w[1]), "r"(w[2]),
               "r"(w[3])
               : "memory");
}
M3_DEVICE void store_words_shared(void* to, const uint32_t (&w)[2]) {
  asm volatile("st.shared.v2.b32 [%0], {%1,%2};\n" ::"r"(shared_address(to)), "r"(w[0]), "r"(w[1]) : "memory");
}
M3_DEVICE void load16(float (&x)[4], const float* from) {
  const float4 y = *reinterpret_cast<const float4*>(from);
  x[0] = y.x, x[1] = y.y, x[2] = y.z, x[3] = y.w;
}

M3_DEVICE int count_bits(uint32_t bits) { return __popc(bits); }

M3_DEVICE float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;\n" : "=f"(y) : "f"(x));
  return y;
}
M3_DEVICE float log2_fast(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;\n" : "=f"(y) : "f"(x));
  return y;
}
M3_DEVICE float from_bits(uint32_t bits) { return __uint_as_float(bits); }
M3_DEVICE uint32_t to_bits(float value) { return __float_as_uint(value); }

// Element types as bits; conversions round to nearest even.
struct Bf16 {
  uint16_t bits;
};
struct Fp16 {
  uint16_t bits;
};

M3_DEVICE float to_float(Bf16 x) { return from_bits(uint32_t{x.bits} << 16); }
M3_DEVICE float to_float(Fp16 x) {
  float y;
  asm("cvt.f32.f16 %0, %1;\n" : "=f"(y) : "h"(x.bits));
  return y;
}

template <class T>
M3_DEVICE T from_float(float x);
template <>
M3_DEVICE Bf16 from_float<Bf16>(float x) {
  Bf16 y;
  asm("cvt.rn.bf16.f32 %0, %1;\n" : "=h"(y.bits) : "f"(x));
  return y;
}
template <>
M3_DEVICE Fp16 from_float<Fp16>(float x) {
  Fp16 y;
  asm("cvt.rn.f16.f32 %0, %1;\n" : "=h"(y.bits) : "f"(x));
  return y;
}

// Two elements in a register, the first in the low half.
template <class T>
M3_DEVICE uint32_t pack(float low, float high);
template <>
M3_DEVICE uint32_t pack<Bf16>(float low, float high) {
  uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;\n" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}
template <>
M3_DEVICE uint32_t pack<Fp16>(float low, float high) {
  uint32_t pair;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;\n" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}
template <class T>
M3_DEVICE float low_of(uint32_t pair) {
  return to_float(T{static_cast<uint16_t>(pair)});
}
template <class T>
M3_DEVICE float high_of(uint32_t pair) {
  return to_float(T{static_cast<uint16_t>(pair >> 16)});
}

// d += a b: a [16, 16] by rows, b [16, 8] by columns, d [16, 8], sums in fp32.
template <class T>
M3_DEVICE void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
template <>
M3_DEVICE void mma<Bf16>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};\n"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
template <>
M3_DEVICE void mma<Fp16>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};\n"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

}  // namespace m3::gpu

#endif
