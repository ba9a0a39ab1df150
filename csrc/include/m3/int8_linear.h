/* x [count, cols] times an int8 weight [rows, cols], transposed, plus a bias, and GELU of it: a linear map of an encoder.
 *
 * Activations are quantised per row of x, asymmetric: low and high are its least and largest value, but at most and at
 * least 0; scale = (high - low) / 255, zero = round(-low / scale), u = round(x / scale) + zero in 0..255, in float32, ties
 * to even. out = scale d (sum of u q - zero sum of q) + bias: sums in int32, exact.
 *
 * A weight lies in tiles of 16 rows: [cols / 4, 16 rows, 4] int8, cols rounded up to a multiple of 64 with zeros, then for
 * each row the scale d (float32), the sum of q (int32) and the bias (float32). Rows past `rows` are zeros. */
#ifndef M3_INT8_LINEAR_H
#define M3_INT8_LINEAR_H

#include "m3/api.h"

#ifdef __cplusplus
extern "C" {
#endif

#define M3_INT8_ROWS 16  /* rows of a tile */
#define M3_INT8_COLS 64  /* columns that a product of tile registers takes */
#define M3_INT8_MOST_COLS 65536  /* sums of more could leave int32 */

typedef struct M3Int8Weight {
  const uint8_t* data;
  int64_t rows, cols;
} M3Int8Weight;

static inline int64_t m3_int8_tiles(const M3Int8Weight* w) { return (w->rows + M3_INT8_ROWS - 1) / M3_INT8_ROWS; }

/* Columns with padding. */
static inline int64_t m3_int8_cols(const M3Int8Weight* w) {
  return (w->cols + M3_INT8_COLS - 1) / M3_INT8_COLS * M3_INT8_COLS;
}

/* Distance of two tiles. */
static inline int64_t m3_int8_tile_bytes(const M3Int8Weight* w) { return M3_INT8_ROWS * (m3_int8_cols(w) + 12); }

typedef struct M3Int8LinearParams {
  M3Int8Weight weight;
  const void* x;      /* [count, x_stride] of x_dtype */
  m3_dtype x_dtype;
  int64_t x_stride;
  int64_t count;
  int32_t gelu;       /* not 0: GELU (by the error function) of the result */
  void* out;          /* [count, out_stride] of out_dtype; columns [0, rows) are written */
  m3_dtype out_dtype;
  int64_t out_stride;
  void* workspace;    /* m3_int8_linear_workspace bytes, 64-byte aligned */
} M3Int8LinearParams;

M3_API int64_t m3_int8_linear_workspace(const M3Int8LinearParams* params);
M3_API m3_status m3_int8_linear_cpu(const M3Int8LinearParams* params);

#ifdef __cplusplus
}
#endif
#endif
