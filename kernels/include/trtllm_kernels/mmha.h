/* Attention of the generation phase: the newest token (or a few) of each sequence over a paged cache. */
#ifndef TRTLLM_KERNELS_MMHA_H
#define TRTLLM_KERNELS_MMHA_H

#include "common.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Token t of sequence b stands at position p = lengths[b] - q_length + t and sees the keys j <= p, and j > p - window
 * where a window is given. Key j lies in page n = page_table[b, j / page_size] of the pools, at [n, kv_head, j %
 * page_size]. The score is  cap(scale * q.k) + slope[head] * (j - p)  with  cap(s) = soft_cap * tanh(s / soft_cap).
 * Query head h reads kv head h / (heads / kv_heads). A token that sees nothing (a sequence of length 0) gives zeros. An
 * 8-bit cache holds value / scale[kv_head]. Lengths above max_length count as max_length, below 0 as 0; with a
 * max_length of 0 caches and page_table may be null.
 *
 * append 1: q is the raw row of a fused projection, heads * D of q, kv_heads * D of k, kv_heads * D of v (q_head_stride
 * D); q_length is 1. q and k are normalised per head (RMS; x / sqrt(mean(x^2) + norm_eps) * (weight + norm_offset);
 * null: not), their first rotary_dim elements rotated by positions[b] (null: lengths[b] - 1), pairing element i with i
 * + rotary_dim / 2, or 2i with 2i + 1 (interleaved); k and v are written to the cache at lengths[b] - 1 (int8: nearest,
 * ties to even, -127..127; E4M3 saturating) and seen as the cache gives them back. No two sequences may share that
 * slot.
 *
 * workspace: trtllm_mmha_workspace_bytes(p), aligned to 16, zeroed once before its first use; each launch leaves it zero.
 * Two launches that may run at the same time need two.
 *
 * Sums are added in an order that depends on lengths, shapes and the GPU's number of multiprocessors only: two runs
 * give the same bits.
 */
typedef struct trtllm_mmha_params {
    const void* q;             /* [batch, q_length, heads, D] */
    void* k_cache;             /* [num_pages, kv_heads, page_size, D]; written with append only */
    void* v_cache;
    void* out;                 /* [batch, q_length, heads, D] */
    const int32_t* page_table; /* [batch, >= max_length / page_size] */
    const int32_t* lengths;    /* [batch]: keys of each sequence, the new ones included */
    const float* k_scale;      /* [kv_heads], 8-bit caches */
    const float* v_scale;
    const float* alibi_slopes; /* [heads]; null for none */
    const float* cos;          /* append: [rotary_positions, rotary_dim / 2] */
    const float* sin;
    const int32_t* positions;  /* append: [batch]; null: lengths - 1 */
    const void* q_norm;        /* append: [D] of dtype; null for none */
    const void* k_norm;
    void* workspace;
    int64_t workspace_bytes;
    int64_t q_batch_stride;    /* strides in elements */
    int64_t q_token_stride;
    int64_t q_head_stride;
    int64_t k_page_stride;     /* of the caches: times the element's bytes a multiple of 16 */
    int64_t k_head_stride;
    int64_t k_token_stride;
    int64_t v_page_stride;
    int64_t v_head_stride;
    int64_t v_token_stride;
    int64_t out_batch_stride;
    int64_t out_token_stride;
    int64_t out_head_stride;
    int64_t page_table_stride;
    int64_t rotary_positions;  /* rows of cos and sin; a position outside is rotated as the nearest one inside */
    int32_t batch;
    int32_t q_length;          /* new tokens of each sequence, 1 to 8 */
    int32_t heads;
    int32_t kv_heads;
    int32_t head_size;         /* 64, 80, 96, 128 or 256 */
    int32_t page_size;         /* 16, 32, 64 or 128 */
    int32_t max_length;        /* no sequence is longer; sizes the grid, costs nothing where it is far too large */
    int32_t window;            /* 0 for none */
    int32_t rotary_dim;        /* append: a multiple of 4, at most D; 0 rotates nothing */
    int32_t interleaved;
    int32_t append;
    int32_t dtype;             /* float16 or bfloat16, of q, out and the norms' weights */
    int32_t cache_dtype;       /* dtype, int8 or float8_e4m3 */
    float scale;               /* > 0 */
    float soft_cap;            /* 0 for none */
    float norm_eps;
    float norm_offset;
    int32_t pdl;               /* 1: the launch may overlap the end of the kernel before it; 2: and what it needs of
                                  lengths, page_table, positions, tables, norms, scales and old keys and values is read
                                  before that kernel has ended (neither it nor one beside it writes them) */
    int32_t blocks;            /* 0: as many as the GPU holds at a time; else this many, at most 4096 */
    int32_t stages;            /* 0: chosen; else 2 to 6 buffers in shared memory for each warp */
} trtllm_mmha_params;

TRTLLM_API int trtllm_mmha(const trtllm_mmha_params* params, trtllm_stream stream);
TRTLLM_API int trtllm_mmha_supports(const trtllm_mmha_params* params, int compute_capability);

/* Enough for every launch with these heads, kv_heads, head_size, q_length and types on the current GPU, whatever the
 * batch and the lengths. */
TRTLLM_API int64_t trtllm_mmha_workspace_bytes(const trtllm_mmha_params* params);

#ifdef __cplusplus
}
#endif
#endif
