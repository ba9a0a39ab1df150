/* x [count, cols] times a packed weight [rows, cols], transposed: the linear layer of inference.
 *
 * A packed weight lies in tiles of 16 rows; a tile is [cols / 32] blocks of 32 columns, followed by their scales
 * ([cols / 32, 16] float16, or pairs d, m of them). Rows past `rows` are zeros. cols is a multiple of 32.
 *   bf16  block: [16 column pairs, 16 rows, 2] bf16
 *   q8_0  block: [16 column pairs, 16 rows, 2] int8; weight = d q
 *   q4_1  block: [4, 16 rows, 2] uint16; bits 4j.. of word [c, r, p] are column 8c + 2j + p; weight = d q + m
 * Values of q8_0 and q4_1 are GGUF's, reordered. Tiles start 64 bytes apart or more: m3_packed_tile_bytes.
 *
 * Activations are rounded to bf16, or, where the weight is quantised and activations says so, to 8 bits of a block (OCP
 * Microscaling v1.0, MXINT8): 32 columns of a row are q 2^(e - 6), |q| <= 127, 2^e the largest power of two that is not
 * above the largest of them in magnitude (e >= -54); NaN where one is not finite, or 2^112 or more. Such values are bf16
 * values, too. Products are exact and summed in float32. */
#ifndef M3_PACKED_LINEAR_H
#define M3_PACKED_LINEAR_H

#include "m3/api.h"

#ifdef __cplusplus
extern "C" {
#endif

#define M3_PACKED_ROWS 16  /* rows of a tile */
#define M3_PACKED_COLS 32  /* columns of a block */

typedef enum m3_weight_format {
  M3_WEIGHT_BF16 = 0,
  M3_WEIGHT_Q8_0 = 1,
  M3_WEIGHT_Q4_1 = 2,
} m3_weight_format;

typedef enum m3_activations {
  M3_ACTIVATIONS_BF16 = 0,
  M3_ACTIVATIONS_MXINT8 = 1,
} m3_activations;

typedef struct M3PackedWeight {
  const uint8_t* data;
  int64_t rows, cols;
  m3_weight_format format;
} M3PackedWeight;

static inline int64_t m3_packed_tiles(const M3PackedWeight* w) {
  return (w->rows + M3_PACKED_ROWS - 1) / M3_PACKED_ROWS;
}

/* Bytes of a block's weights, and of its scales. */
static inline int64_t m3_packed_block_bytes(m3_weight_format format) {
  return format == M3_WEIGHT_BF16 ? 1024 : format == M3_WEIGHT_Q8_0 ? 512 : 256;
}
static inline int64_t m3_packed_scale_bytes(m3_weight_format format) {
  return format == M3_WEIGHT_BF16 ? 0 : format == M3_WEIGHT_Q8_0 ? 32 : 64;
}

/* Distance of two tiles. */
static inline int64_t m3_packed_tile_bytes(const M3PackedWeight* w) {
  const int64_t bytes =
      w->cols / M3_PACKED_COLS * (m3_packed_block_bytes(w->format) + m3_packed_scale_bytes(w->format));
  return (bytes + 63) / 64 * 64;
}

/* Cache lines one after the other. */
typedef struct M3Lines {
  const char* at;
  int64_t count;
} M3Lines;

typedef struct M3PackedLinearParams {
  M3PackedWeight weight;
  const uint16_t* x;  /* bf16 [count, x_stride], 4-byte aligned; x_stride even. mxint8: what m3_pack_activations wrote */
  int64_t x_stride;   /* elements */
  const float* sums;  /* [count, cols / 32]: sum of x over each block (m3_pack_activations); q4_1 and mxint8 read it */
  const float* scales; /* [count, cols / 32]: 2^(e - 6) (m3_pack_activations); only mxint8 reads it */
  m3_activations activations; /* bf16 for bf16 weights */
  const M3Lines* ahead; /* [stretches] that will be read soon: fetched on the way where x has few rows */
  int64_t stretches;
  int64_t count;
  void* out;          /* [count, out_stride] of out_dtype; columns [0, rows) are written */
  m3_dtype out_dtype;
  int64_t out_stride;
} M3PackedLinearParams;

M3_API m3_status m3_packed_linear_cpu(const M3PackedLinearParams* params);

/* Rows that a weight of some format will be multiplied by. */
typedef struct M3PackedRows {
  m3_activations activations;
  m3_weight_format format;
  int64_t cols;   /* a multiple of 32 */
  uint16_t* x;    /* [count, cols]: bf16; mxint8: as the kernels of this machine take it, in no more room */
  float* sums;    /* [count, cols / 32], or null */
  float* scales;  /* [count, cols / 32]; null for bf16 */
} M3PackedRows;

/* x [count, stride] of any element type, rounded. */
M3_API m3_status m3_pack_activations(const void* x, m3_dtype dtype, int64_t stride, int64_t count,
                                     const M3PackedRows* out);

#ifdef __cplusplus
}
#endif
#endif
