/* The next token of each request from its logits, on the GPU. */
#ifndef TRTLLM_KERNELS_SAMPLING_H
#define TRTLLM_KERNELS_SAMPLING_H

#include "common.h"

#ifdef __cplusplus
extern "C" {
#endif

/* For each row of logits, in this order: penalties, temperature, top-k, top-p, min-p, a draw. All in device memory, an
 * entry a request; a NULL array stands for the neutral value.
 *
 * penalties: x > 0 ? x / repetition : x * repetition for tokens seen; then x -= frequency * n, and x -= presence where
 *   n > 0, for a token generated n times. `counts` int16 [batch, vocab] says what was seen: the low 15 bits are n, the
 *   sign bit says that the prompt holds the token.
 * temperature 0: the largest logit, the least id among equals; what follows has no effect.
 * weights: of a logit x the whole number w = floor(2^40 * e(x)), e(x) = exp((x - max) / temperature) in float32 by the
 *   polynomial of src/sampling/weights.cuh. All sums of weights are exact, so that a row's token depends neither on the
 *   batch nor on how a row is spread over the GPU.
 * top_k k > 0: logits below the k-th largest go; equals of it stay. top_p p < 1: in order of falling logit, of rising id
 *   among equals, a token stays while the weight before it is below p times the weight left by top-k. min_p: weights
 *   below min_p times the largest go.
 * draw: r = the first two words (low word first) of Philox4x32-10 (Salmon et al., 2011) with key (seed low, seed high)
 *   and counter (step, i, 0, 0), i = 0 first; t = floor(r * total / 2^64); the first token in order of id whose weight,
 *   added to those before it, exceeds t. Weights and total are those that top-k and min-p leave; where the token drawn is
 *   none that top-p keeps, it goes with all that comes after it in top-p's order, and i + 1 draws among the others.
 *
 * tokens[i] is -1 where a row holds NaN or positive infinity, or nothing but negative infinity. With `advance`, the
 * chosen token is counted in `counts` and steps[i] grows by one (for such a row neither happens). */
typedef struct trtllm_sampling_params {
    const void* logits; /* [batch, vocab], rows logits_stride apart */
    int16_t* counts;    /* rows counts_stride apart */
    const float* temperature;
    const int32_t* top_k;
    const float* top_p;
    const float* min_p;
    const float* repetition;
    const float* frequency;
    const float* presence;
    const int64_t* seeds;
    int32_t* steps;
    int32_t* tokens;
    int64_t logits_stride;
    int64_t counts_stride;
    int32_t batch;
    int32_t vocab;
    int32_t dtype;   /* float16, bfloat16 or float32 */
    int32_t advance;
    int32_t cluster; /* thread blocks a row: 1, from 9.0 on also 2, 4, 8, on 9.0 and 10.0 also 16; 0 chooses */
    int32_t pdl;     /* as in pointwise.h */
} trtllm_sampling_params;

TRTLLM_API int trtllm_sampling(const trtllm_sampling_params* params, trtllm_stream stream);
TRTLLM_API int trtllm_sampling_supports(const trtllm_sampling_params* params, int compute_capability);

#ifdef __cplusplus
}
#endif
#endif
