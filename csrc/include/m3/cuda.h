/* The CUDA kernels (libm3_cuda): the params of the CPU launchers, with pointers to device memory, and a stream.
 *
 * Launchers queue work on the stream and return: they allocate nothing, wait for nothing, and can be captured in a
 * graph. Values of index tensors are not looked at on the host; in kernels a bad one counts as absent. M3_UNSUPPORTED:
 * the call is legal, but not for these kernels (docs/gpu.md says what they take); nothing has been queued then. */
#ifndef M3_CUDA_H
#define M3_CUDA_H

#include "m3/gather_dequantize.h"
#include "m3/gather_memory.h"
#include "m3/memory_attention.h"
#include "m3/memory_decode.h"
#include "m3/memory_decode_coded.h"
#include "m3/merge_attention_states.h"
#include "m3/scatter_memory.h"
#include "m3/select_tokens.h"
#include "m3/vq_dequantize.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Text of this thread's last failed call of a function of this header; valid until the next one. */
M3_API const char* m3_cuda_last_error(void);
/* Compute capabilities this library has code for, as in "80;90+PTX"; +PTX: newer devices compile that one when loading. */
M3_API const char* m3_cuda_archs(void);
/* While on, launchers that this thread calls check their arguments as ever, and queue nothing. */
M3_API void m3_cuda_dry_run(int on);

/* A workspace is device memory of at least the bytes m3_<op>_cuda_workspace gives, aligned to 16; null where that is 0. */
M3_API int64_t m3_memory_decode_cuda_workspace(const M3MemoryDecodeParams* params);
M3_API m3_status m3_memory_decode_cuda(const M3MemoryDecodeParams* params, void* workspace, void* stream);

M3_API int64_t m3_memory_decode_coded_cuda_workspace(const M3MemoryDecodeCodedParams* params);
M3_API m3_status m3_memory_decode_coded_cuda(const M3MemoryDecodeCodedParams* params, void* workspace, void* stream);

M3_API m3_status m3_merge_attention_states_cuda(const M3MergeAttentionStatesParams* params, void* stream);

M3_API m3_status m3_memory_attention_cuda(const M3MemoryAttentionParams* params, void* stream);
M3_API int64_t m3_memory_attention_backward_cuda_workspace(const M3MemoryAttentionBackwardParams* params);
M3_API m3_status m3_memory_attention_backward_cuda(const M3MemoryAttentionBackwardParams* params, void* workspace,
                                                   void* stream);

/* `workers` and `workspace` are not looked at. */
M3_API m3_status m3_select_tokens_cuda(const M3SelectTokensParams* params, void* stream);
M3_API m3_status m3_gather_memory_cuda(const M3GatherMemoryParams* params, void* stream);
M3_API m3_status m3_scatter_memory_cuda(const M3ScatterMemoryParams* params, void* stream);
M3_API m3_status m3_vq_dequantize_cuda(const M3VqDequantizeParams* params, void* stream);
M3_API m3_status m3_gather_dequantize_cuda(const M3GatherDequantizeParams* params, void* stream);

#ifdef __cplusplus
}
#endif
#endif
