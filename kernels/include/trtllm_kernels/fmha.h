/* Attention of the context phase: many new tokens a sequence, forward only, scores never stored. */
#ifndef TRTLLM_KERNELS_FMHA_H
#define TRTLLM_KERNELS_FMHA_H

#include "common.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Sequence b owns the rows q_starts[b] .. q_starts[b + 1] - 1 of q and out. Its keys and values are
 *  - packed: the rows kv_starts[b] .. kv_starts[b + 1] - 1 of k and v [kv_tokens, kv_heads, D], or
 *  - paged (page_table not null): the first kv_lengths[b] positions of the pages page_table[b, 0 ...] of the pools
 *    k and v [num_pages, kv_heads, page_size, D].
 * Its queries are its last positions: query i stands at p = i + kv_length - q_length. Query p sees key j where
 *     causal: j <= p;    window w > 0 (causal only): j > p - w
 * with the score  cap(scale * q.k) + slope[head] * (j - p),  cap(s) = soft_cap * tanh(s / soft_cap). A query that sees
 * nothing gives zeros, and minus infinity as its log-sum-exp. Query head h reads kv head h / (heads / kv_heads).
 *
 * Strides count elements and must be multiples of 8; pointers are aligned to 16 bytes; D is contiguous.
 */
typedef struct trtllm_fmha_params {
    const void* q;               /* [q_tokens, heads, D] */
    const void* k;
    const void* v;
    void* out;                   /* [q_tokens, heads, D] */
    float* lse;                  /* [heads, q_tokens]: natural log-sum-exp of the scores; may be null */
    const int32_t* q_starts;     /* [batch + 1] */
    const int32_t* kv_starts;    /* [batch + 1], packed */
    const int32_t* page_table;   /* [batch, >= pages of the longest sequence], paged */
    const int32_t* kv_lengths;   /* [batch], paged */
    const float* alibi_slopes;   /* [heads]; null for none */
    void* workspace;             /* trtllm_fmha_workspace_bytes of any content; null: slower where tiles differ in length */
    int64_t q_tokens;
    int64_t kv_tokens;           /* packed: rows of k and v */
    int64_t num_pages;           /* paged */
    int64_t q_token_stride;
    int64_t q_head_stride;
    int64_t k_token_stride;      /* paged: within a page */
    int64_t k_head_stride;
    int64_t k_page_stride;
    int64_t v_token_stride;
    int64_t v_head_stride;
    int64_t v_page_stride;
    int64_t out_token_stride;
    int64_t out_head_stride;
    int64_t page_table_stride;
    int32_t batch;
    int32_t max_q_length;        /* no sequence has more new tokens */
    int32_t heads;
    int32_t kv_heads;
    int32_t head_size;           /* 64, 80, 96, 128 or 256 */
    int32_t page_size;           /* 16, 32, 64 or 128; 0: packed */
    int32_t causal;
    int32_t window;              /* 0 for none */
    float scale;                 /* > 0 */
    float soft_cap;              /* 0 for none */
    int32_t dtype;               /* float16 or bfloat16, of q, k, v and out */
    int32_t half_sums;           /* float16 only: products may be summed in float16 within a tile. Kernel 1 does so, kernel 0
                                    where that is faster (not on 8.0, 9.0, 10.0), kernel 2 refuses */
    int32_t kernel;              /* 0: the best one; 1: portable; 2: Hopper's (refused where it cannot serve) */
    int32_t pdl;                 /* let this launch overlap the end of the kernel before it */
} trtllm_fmha_params;

TRTLLM_API int trtllm_fmha(const trtllm_fmha_params* params, trtllm_stream stream);
TRTLLM_API int64_t trtllm_fmha_workspace_bytes(const trtllm_fmha_params* params);
TRTLLM_API int trtllm_fmha_supports(const trtllm_fmha_params* params, int compute_capability);

#ifdef __cplusplus
}
#endif
#endif
