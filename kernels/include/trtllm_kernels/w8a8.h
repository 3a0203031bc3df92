/* Products of 8-bit activations and 8-bit weights, scales applied to the sums. */
#ifndef TRTLLM_KERNELS_W8A8_H
#define TRTLLM_KERNELS_W8A8_H

#include "common.h"

#ifdef __cplusplus
extern "C" {
#endif

/* out[m, n] = sum_k a[m, k] * w[n, k] * a_scale[m or 0] * w_scale[n or 0] (+ bias[n]) (+ residual[m, n]).
 *
 * int8 sums in int32 (exact; k below 131072), float8_e4m3 in float32. The scaling is float32: the sum, rounded to
 * float32, times a_scale, times w_scale, plus bias, plus residual, each rounded, then rounded to out_dtype.
 * Rows start `*_stride` elements apart, their elements are contiguous. k, a_stride and w_stride are multiples of 16, a and
 * w start at multiples of 16 bytes. out may be residual itself, and overlaps nothing else.
 */
typedef struct trtllm_w8a8_params {
    const void* a;        /* [m, k] of dtype */
    const void* w;        /* [n, k] of dtype */
    const float* a_scale; /* [m] when a_scale_per_token, else [1] */
    const float* w_scale; /* [n] when w_scale_per_channel, else [1] */
    const void* bias;     /* [n] of out_dtype, or null */
    const void* residual; /* [m, n] of out_dtype, or null */
    void* out;            /* [m, n] of out_dtype */
    int64_t m;
    int64_t n;
    int64_t k;
    int64_t a_stride;
    int64_t w_stride;
    int64_t residual_stride;
    int64_t out_stride;
    int32_t dtype;               /* int8 or float8_e4m3, of a and w */
    int32_t out_dtype;           /* float16 or bfloat16 */
    int32_t a_scale_per_token;   /* 0 or 1 */
    int32_t w_scale_per_channel; /* 0 or 1 */
    /* float8 only. The matrix unit of compute capability 8.9 and 9.0 keeps about 14 bits of a running sum. 0: partial
     * sums of 128 products are added up in float32; 1: the matrix unit may sum all of k by itself. */
    int32_t fast_accumulation;
    int32_t pdl;    /* 1: programmatic dependent launch; w must then not be written by the kernel before */
    int32_t tactic; /* 0: chosen by shape; else one of trtllm_w8a8_tactic(i), refused where it cannot serve */
} trtllm_w8a8_params;

TRTLLM_API int trtllm_w8a8(const trtllm_w8a8_params* params, trtllm_stream stream);
TRTLLM_API int trtllm_w8a8_supports(const trtllm_w8a8_params* params, int compute_capability);

/* What `tactic` 0 stands for with these parameters on such a GPU of `multiprocessors`; 0 when refused. */
TRTLLM_API int trtllm_w8a8_choose(const trtllm_w8a8_params* params, int compute_capability, int multiprocessors);

/* The i-th tactic (1-based): a number for `tactic`; 0 past the last. */
TRTLLM_API int trtllm_w8a8_tactic(int i);

#ifdef __cplusplus
}
#endif
#endif
