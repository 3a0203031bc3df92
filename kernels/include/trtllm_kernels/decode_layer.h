/* Whole decoder layers for one new token in one launch: all of a step but embedding, last norm and head.
 *
 * For each layer, with rows x [hidden], every arrow from all blocks to all:
 *
 *   qkv = norm(x) * Wqkv^T (+ bias)  ->  rotary, cache write, attention  ->  y = attended * Wo^T + x
 *     ->  gated = silu(gate) * up of norm(y) * Wup^T  ->  x = gated * Wdown^T + y
 *
 * Roundings are those of trtllm_weight_only_gemm and trtllm_mmha in a row: every intermediate above in dtype, sums in
 * float32. Blocks stay on their multiprocessors from the first layer to the last and ask for the weights of what comes
 * next while they wait, so memory is read at full speed across products and layers.
 *
 * Weights are those of trtllm_weight_only_gemm (weight_only.h): packed, or dense with rows K apart; gate and up
 * interleaved in blocks of 8 rows. All products have one type. The cache is paged as in mmha.h, of dtype, one page
 * table for all layers, whose pools are apart; tokens of a page lie head_size elements apart. Key and value of the new
 * token are written at lengths[0] - 1.
 *
 * The grid is one block a multiprocessor and must run at once: the launch is cooperative, and where another kernel
 * holds multiprocessors, it starts when that has ended. A block that waits far longer than any other could need (some
 * seconds) stores 1 in `failed` and ends, and so do all others; results are then not to be used. `failed` stays 0
 * otherwise.
 *
 * workspace: trtllm_decode_layer_workspace_bytes(p), aligned to 256, zeroed once before its first use; each launch
 * leaves it fit for the next. Two launches that may run at the same time need two.
 */
#ifndef TRTLLM_KERNELS_DECODE_LAYER_H
#define TRTLLM_KERNELS_DECODE_LAYER_H

#include "common.h"

#ifdef __cplusplus
extern "C" {
#endif

/* One row of the table of layers, in device memory. Scales float32 [Np] for 8-bit weights, else null. */
typedef struct trtllm_decode_layer_row {
    const void* weight[4];  /* qkv [(heads + 2 kv_heads) * D, hidden], o [hidden, heads * D], gate and up [2 wide,
                               hidden], down [hidden, wide] */
    const float* scale[4];
    const void* qkv_bias;   /* of dtype; null for none */
    const void* norm[2];    /* [hidden] of dtype: before attention, before the MLP */
    void* k_cache;          /* [pages, kv_heads, page_size, D] */
    void* v_cache;
    float multiplier[4];    /* weight_multiplier of each product */
} trtllm_decode_layer_row;

typedef struct trtllm_decode_layer_params {
    const void* x;             /* [hidden] of dtype */
    void* out;                 /* [hidden] of dtype; may be x */
    const trtllm_decode_layer_row* table; /* [layers], in device memory */
    const int32_t* page_table; /* [>= max_length / page_size] */
    const int32_t* lengths;    /* [1]: keys with the new one; below 1 counts as 1, above max_length as max_length */
    const float* cos;          /* [rotary_positions, head_size / 2] */
    const float* sin;
    int32_t* failed;           /* [1] */
    void* workspace;
    int64_t workspace_bytes;
    int64_t page_stride;       /* of both caches, in elements; a multiple of 8 */
    int64_t head_stride;
    int32_t layers;
    int32_t hidden;            /* a multiple of 16 up to 8192 */
    int32_t heads;             /* up to 8 a kv head */
    int32_t kv_heads;
    int32_t head_size;         /* 64 or 128 */
    int32_t wide;              /* width of the MLP, a multiple of 16 */
    int32_t page_size;         /* 16, 32, 64 or 128 */
    int32_t max_length;
    int32_t rotary_positions;  /* a position beyond is rotated as the last one */
    int32_t group;             /* int4: 32, 64, 128 */
    int32_t has_zero;
    int32_t weight_dtype;      /* int4, int8, float8_e4m3, or dtype */
    int32_t dtype;             /* float16 or bfloat16 */
    float scale;               /* of the scores, > 0 */
    float norm_eps;
    float norm_offset;
    int32_t block_keys;        /* least keys of a block in attention, a multiple of 16; 0: chosen */
    int32_t pdl;               /* 1: the launch may overlap the end of the kernel before it */
} trtllm_decode_layer_params;

TRTLLM_API int trtllm_decode_layer(const trtllm_decode_layer_params* params, trtllm_stream stream);
TRTLLM_API int trtllm_decode_layer_supports(const trtllm_decode_layer_params* params, int compute_capability);
/* On the current GPU. */
TRTLLM_API int64_t trtllm_decode_layer_workspace_bytes(const trtllm_decode_layer_params* params);

#ifdef __cplusplus
}
#endif
#endif
