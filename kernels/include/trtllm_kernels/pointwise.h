/* Kernels between the products: gates, norms, quantization of activations, rotary with cache write, embedding.
 *
 * The last axis of every matrix is contiguous; rows start `*_stride` elements apart. An output of 8 bits needs exactly
 * one of `token_scales` (float32 [tokens], written: each row's max|y| / 127 or 448, 1 for a row of zeros) and
 * `static_scale` (float32 [1], read: a positive normal number); any other output needs neither. Values are y / scale to
 * the nearest, ties to even, saturating at -128..127 or +-448. The arithmetic is float32.
 *
 * `pdl` 1 starts the kernel while the one before it in the stream still ends (programmatic dependent launch, compute
 * capability 9.0 and later; ignored before). Weights (gamma, beta, tables of an embedding, cos, sin, scales) may then be
 * read before the kernel before has finished: it must not write them.
 */
#ifndef TRTLLM_KERNELS_POINTWISE_H
#define TRTLLM_KERNELS_POINTWISE_H

#include "common.h"

#ifdef __cplusplus
extern "C" {
#endif

/* out[t, i] = act(gate[t, i]) * up[t, i]. `out` may be `gate` or `up` where it has their type. */
typedef struct trtllm_gated_params {
    const void* gate;
    const void* up;
    void* out;
    const float* static_scale;
    float* token_scales;
    int64_t tokens;
    int64_t width;
    int64_t gate_stride;
    int64_t up_stride;
    int64_t out_stride;
    int32_t dtype;      /* float16, bfloat16 or float32 */
    int32_t out_dtype;  /* dtype, int8 or float8_e4m3 */
    int32_t activation; /* 0 silu, 1 gelu (erf), 2 gelu_tanh */
    int32_t pdl;
} trtllm_gated_params;

TRTLLM_API int trtllm_gated(const trtllm_gated_params* params, trtllm_stream stream);
TRTLLM_API int trtllm_gated_supports(const trtllm_gated_params* params, int compute_capability);

/* h = x + residual (x alone where residual is NULL), rounded to dtype; residual_out = h where it is not NULL;
 * out = normalised h: kind 0 (rms): h / sqrt(mean(h^2) + eps) * (gamma + gamma_offset);
 * kind 1 (layer): (h - mean) / sqrt(variance + eps) * (gamma + gamma_offset) + beta;
 * kind 2: h itself, which makes this the quantization of activations.
 * gamma and beta [width] of dtype, NULL for 1 - gamma_offset and 0. `out` may be x, `residual_out` x or `residual`. */
typedef struct trtllm_norm_params {
    const void* x;
    const void* residual;
    const void* gamma;
    const void* beta;
    void* residual_out;
    void* out;
    const float* static_scale;
    float* token_scales;
    int64_t tokens;
    int64_t width;
    int64_t x_stride;
    int64_t residual_stride;
    int64_t residual_out_stride;
    int64_t out_stride;
    float eps;
    float gamma_offset;
    int32_t kind;
    int32_t dtype;     /* float16, bfloat16 or float32 */
    int32_t out_dtype; /* dtype, int8 or float8_e4m3 */
    int32_t pdl;
} trtllm_norm_params;

TRTLLM_API int trtllm_norm(const trtllm_norm_params* params, trtllm_stream stream);
TRTLLM_API int trtllm_norm_supports(const trtllm_norm_params* params, int compute_capability);

/* From a fused projection's row (heads * head_dim of q, kv_heads * head_dim of k, as much of v) to attention's inputs:
 * q and k are normalised per head (RMS over head_dim, weights q_norm and k_norm [head_dim] + norm_offset; NULL: not),
 * their first rotary_dim elements are rotated by the token's position, q goes to q_out, k and v to the paged cache:
 * element d of kv head h at position n of sequence s lies in page p = page_table[s, n / page_size] at
 * pool[p * page_stride + (h * page_size + n % page_size) * head_dim + d]. An 8-bit cache holds value / scale[h], whole
 * numbers in -127..127 or E4M3. Rotation pairs element i with i + rotary_dim / 2, or 2i with 2i + 1 (interleaved).
 *
 * A token whose position is not in [0, max_positions), whose sequence is not in [0, batch) or whose page is not in
 * [0, num_pages) is padding: nothing of it is cached, and its q and k are rotated as at position 0. No two tokens may
 * share a slot. q_out may be qkv (with its stride), k_out the k part of it; k_out (rotated k) and the pools may be NULL. */
typedef struct trtllm_rotary_params {
    const void* qkv;
    const void* q_norm;
    const void* k_norm;
    const float* cos; /* [max_positions, rotary_dim / 2] */
    const float* sin;
    const int32_t* positions;  /* [tokens] */
    const int32_t* sequences;  /* [tokens] */
    const int32_t* page_table; /* [batch, max_pages], rows page_table_stride apart */
    const float* k_scale;      /* [kv_heads] */
    const float* v_scale;
    void* q_out;
    void* k_out;
    void* k_pool;
    void* v_pool;
    int64_t tokens;
    int64_t qkv_stride;
    int64_t q_out_stride;
    int64_t k_out_stride;
    int64_t page_table_stride;
    int64_t page_stride;
    int32_t heads;
    int32_t kv_heads;
    int32_t head_dim;   /* even, at most 512 */
    int32_t rotary_dim; /* even, at most head_dim; 0 rotates nothing */
    int32_t max_positions;
    int32_t batch;
    int32_t max_pages;
    int32_t num_pages;
    int32_t page_size;
    float eps;
    float norm_offset;
    int32_t interleaved;
    int32_t dtype;       /* float16 or bfloat16 */
    int32_t cache_dtype; /* dtype, int8 or float8_e4m3 */
    int32_t pdl;
} trtllm_rotary_params;

TRTLLM_API int trtllm_rotary(const trtllm_rotary_params* params, trtllm_stream stream);
TRTLLM_API int trtllm_rotary_supports(const trtllm_rotary_params* params, int compute_capability);

/* out[t] = table[ids[t]] * scale (and * row_scales[ids[t]] for an int8 table). A negative id is padding: zeros. An id of
 * vocab or more has no row: NaN, so that the mistake shows. */
typedef struct trtllm_embedding_params {
    const void* table; /* [vocab, width] */
    const float* row_scales;
    const void* ids; /* int32 or int64 [tokens] */
    void* out;
    int64_t tokens;
    int64_t width;
    int64_t vocab;
    int64_t table_stride;
    int64_t out_stride;
    float scale;
    int32_t wide_ids;    /* 1: ids are int64 */
    int32_t dtype;       /* of out: float16, bfloat16 or float32 */
    int32_t table_dtype; /* dtype or int8 */
    int32_t pdl;
} trtllm_embedding_params;

TRTLLM_API int trtllm_embedding(const trtllm_embedding_params* params, trtllm_stream stream);
TRTLLM_API int trtllm_embedding_supports(const trtllm_embedding_params* params, int compute_capability);

#ifdef __cplusplus
}
#endif
#endif
