/* decode_step: the new tokens of every sequence, one each or many, through a whole decoder of the Llama family, in one call.
 *
 * Per layer: RMSNorm, queries, keys and values, RoPE, keys and values into the cache, attention over cache and records,
 * output, RMSNorm, gate and up, silu(gate) up, down. Then the last norm and the head. Layers that are not named read no
 * records. The residual stream is fp32; what enters attention or the linear map of a bf16 weight is rounded to bf16, what enters other
 * maps as `activations` says (m3/packed_linear.h). */
#ifndef M3_DECODE_STEP_H
#define M3_DECODE_STEP_H

#include "m3/packed_linear.h"
#include "m3/records.h"

#ifdef __cplusplus
extern "C" {
#endif

/* The packed weights of a layer, in the order in which they are used; those of the layers follow one another. */
enum { M3_STEP_QKV = 0, M3_STEP_OUT = 1, M3_STEP_GATE_UP = 2, M3_STEP_DOWN = 3, M3_STEP_LINEARS = 4 };

/* Where a step's time goes, as its first thread sees it. Waiting is counted apart. */
enum {
  M3_STEP_EMBED = 0,
  M3_STEP_NORM = 1,
  M3_STEP_LINEAR = 2,
  M3_STEP_ATTENTION = 3, /* RoPE and the cache included */
  M3_STEP_FFN = 4,
  M3_STEP_HEAD = 5,
  M3_STEP_WAIT = 6,
  M3_STEP_STAGES = 7
};

typedef struct M3DecodeStepParams {
  int64_t batch, layers, vocab, dim, heads, kv_heads, head_dim, ffn; /* B, L, V, C, Hq, Hkv, D, F */
  int64_t count;            /* T: new tokens, those of a sequence after one another; B where cu_q is null */
  const int64_t* tokens;    /* [T], below vocab */
  const int32_t* lengths;   /* [B]: cache rows in use before them; token i of sequence b goes into row lengths[b] + i */
  int64_t span;             /* its position is that row + span */
  const int32_t* cu_q;      /* [B + 1]: tokens of sequence b are [cu_q[b], cu_q[b + 1]); null: one each */
  const int32_t* cu_chunk;  /* [C + 1]: tokens that read the same records; null: those of a sequence */
  int64_t wanted;           /* tokens whose logits are wanted; B where `rows` is null */
  const int64_t* rows;      /* [wanted], below T; null: the last of each sequence, zeros for one without */
  const uint16_t* embed;    /* bf16 [V, C] */
  int64_t embed_stride;
  const float* norms;       /* [2 L + 1, C]: before attention, before the feed-forward; the last one before the head */
  m3_activations activations; /* that meet quantised weights */
  const M3PackedWeight* weights; /* [4 L + 1]: M3_STEP_QKV .. M3_STEP_DOWN of every layer; the head */
  const float* cos;         /* [P, D]; sin carries the sign: x cos + swap_halves(x) sin */
  const float* sin;
  int64_t positions;        /* P */
  float eps, scale;
  uint16_t* k_cache;        /* bf16 [L, B, N, Hkv, D], last stride 1 */
  uint16_t* v_cache;
  int64_t capacity;         /* N */
  int64_t k_stride[4], v_stride[4];
  int64_t memory_layers;         /* Lm; 0: no records, memory is not read */
  const int64_t* memory_layer;   /* [Lm] ascending: the layers that read records */
  M3Records memory;              /* of the first memory layer; chunks = C; head_map [Lm, Hkv] contiguous or null */
  int64_t memory_stride, bias_stride; /* from one memory layer to the next: of memory.k and memory.v; of memory.bias */
  int threads;              /* that may work on it */
  void* workspace;          /* m3_decode_step_workspace bytes, 64-byte aligned */
  float* logits;            /* [wanted, V] contiguous */
  float* mass;              /* [T, R]: mean over memory layers and heads, or null */
  int64_t* profile;         /* [M3_STEP_STAGES] nanoseconds are added, or null */
} M3DecodeStepParams;

/* Bytes; reads sizes, memory.chunks and memory.refs, threads, and whether cu_q is null. */
M3_API int64_t m3_decode_step_workspace(const M3DecodeStepParams* params);
M3_API m3_status m3_decode_step_cpu(const M3DecodeStepParams* params);

#ifdef __cplusplus
}
#endif
#endif
