/* Products with weights of 4, 8 or 16 bits and activations of 16: out = act(norm(x)) * W^T (+ bias) (+ residual).
 *
 * PACKED WEIGHTS (int4, int8, float8_e4m3). One buffer serves every kernel, at any number of tokens.
 * trtllm_cli/ops/cuda/weight_only_packing.py writes it and is the same text in torch.
 *
 * N is padded to Np, a multiple of 64; K to Kp, a multiple of the tile depth T = 128 (int4) or 64 (8 bits). A *tile* is
 * 16 rows x T inputs with its scales, B bytes (a multiple of 16), and tiles lie as [Np / 16 stripes][Kp / T][B]: a
 * stripe of 16 rows is one contiguous run, so that any number of its tiles is one bulk copy, and tiles of several
 * stripes are a box of the matrix of bytes [Np / 16][Kp / T * B].
 *
 *   int4:   B = 1024 + 32 P + (zeros: 16 P), P = 128 / group groups in a tile; bytes 0..1023 weights, then
 *           float16 scale[8 g][P][2] (row g's and row g + 8's scale for each of the tile's groups: lane / 4 = g reads
 *           4 P contiguous bytes), then, where `has_zero`, uint8 zero[8 g][P][2] with values 0..15 in the same order.
 *   8 bits: B = 1024, weights alone; the rows' scales are `scale`, float32 [Np].
 *
 * A tile's 1024 bytes of weights are 16-byte chunks [2 halves h][32 lanes]: chunk (h, lane) belongs to row
 * 8 h + lane / 4 and holds, with c = lane % 4, for every k16 step s of the tile the inputs k = 16 s + {2c, 2c+1, 2c+8,
 * 2c+9}. So with W as the first operand of mma.m16n8k16 (or of wgmma from registers, a warp's 16 of 64 rows), registers
 * a0, a2 come from the lane's chunk h = 0 and a1, a3 from h = 1, at the activations' natural order of k (PTX ISA,
 * "Matrix Fragments for mma.m16n8k16 with floating point type"). A chunk is four 32-bit words (little endian):
 *
 *   int4, word t = 0..3, steps 2t and 2t+1, eight nibbles v0..v7 (0..15), v0 the lowest:
 *       v0 v4 = step 2t,   k 2c   and 2c+1        v1 v5 = step 2t,   k 2c+8 and 2c+9
 *       v2 v6 = step 2t+1, k 2c   and 2c+1        v3 v7 = step 2t+1, k 2c+8 and 2c+9
 *     and then the word is rotated LEFT by 3 bits. The pair (v[i], v[i+4]) is therefore rotate_right(word, 4 i) &
 *     0x00780078, in mantissa bits 3..6 of two 16-bit halves: or-ing 0x41804180 makes bfloat16 16 + v, 0x58005800 makes
 *     float16 128 + v, and the bare bits are the float16 subnormals v * 2^-21, exact in the matrix units.
 *   8 bits, word t = 0..3, step t: byte 0 = k 2c, byte 2 = k 2c+1, byte 1 = k 2c+8, byte 3 = k 2c+9.
 *     int8 is stored 128 higher (0..255), float8_e4m3 as it is.
 *
 * What weights mean: int4 (v - zero) * scale * weight_multiplier, zero 8 without `has_zero`; 8 bits v * scale *
 * weight_multiplier. Groups are `group` consecutive inputs: 32, 64 or 128 (a checkpoint with a larger multiple of 128
 * repeats its scales). Padding: int4 rows and groups beyond N and K have scale 0 and zero 0 (nibbles are 0 there), int8
 * has value 0 (code 128), float8 +0; the 8-bit scale of padding rows is 0. Kernels never read x beyond K.
 *
 * weight_multiplier is a power of two that keeps int4 scales inside float16's range, 1 nearly always.
 *
 * GATED rows (gate/up of an MLP in one matrix, `gate` below): width must be a multiple of 8, N = 2 * width, and rows
 * alternate in blocks of 8: stripe s holds gate rows 8s..8s+7, then up rows 8s..8s+7. Rows g and g + 8 of a stripe are
 * one pair, held by the same lane. Dense weights take the same order of rows.
 *
 * `order` (GPTQ with act-order): the packer sorts the inputs by group; packed input i is x[order[i]].
 *
 * DENSE weights (weight_dtype float16 or bfloat16, equal to dtype): row-major [N][weight_stride], K a multiple of 8.
 */
#ifndef TRTLLM_KERNELS_WEIGHT_ONLY_H
#define TRTLLM_KERNELS_WEIGHT_ONLY_H

#include "common.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct trtllm_weight_only_gemm_params {
    const void* x;           /* [M, K], rows x_stride elements apart */
    const void* weight;      /* packed, or dense [N, K] */
    const void* scale;       /* 8 bits: float32 [Np]; null for int4 and dense */
    const void* bias;        /* [N] of dtype, or null (gated: in the order of the rows) */
    const void* residual;    /* [M, N out], rows residual_stride elements apart, or null; may be `out` itself */
    void* out;               /* [M, N out]; N out = N, gated N / 2 */
    const void* norm_weight; /* [K] of dtype: x is RMS-normalised first (then rounded to dtype); null: it is not */
    const void* order;       /* int32 [K], or null */
    void* workspace;         /* 16-byte aligned, workspace_bytes of trtllm_weight_only_gemm_workspace_bytes or more */
    int64_t workspace_bytes;
    int64_t m, n, k;         /* n and k are the true sizes, not the padded ones */
    int64_t x_stride, residual_stride, out_stride;
    int64_t weight_stride; /* dense only */
    float weight_multiplier;
    float norm_eps;
    float norm_offset;    /* the norm multiplies by norm_offset + norm_weight (0, or 1 for Gemma) */
    int32_t group;        /* int4: 32, 64, 128 */
    int32_t has_zero;     /* int4: tiles carry zeros */
    int32_t weight_dtype; /* int4, int8, float8_e4m3, or dtype */
    int32_t dtype;        /* float16 or bfloat16: x, bias, residual, out, norm_weight */
    int32_t gate;         /* 0 none; out = act(gate row) * up row with act 1 silu, 2 gelu (erf), 3 gelu_tanh */
    int32_t pdl;          /* 1: programmatic dependent launch; before its wait it reads what no kernel writes: weight,
                             scale, bias, norm_weight, order */
    int32_t tactic;       /* 0: by size; 1..99: one of few tokens' kernels; from 100 on: one of the tensor cores' */
} trtllm_weight_only_gemm_params;

/* The residual is added last: out = round(act(...) + bias ... + residual), one rounding from float32 sums. */
TRTLLM_API int trtllm_weight_only_gemm(const trtllm_weight_only_gemm_params* params, trtllm_stream stream);
TRTLLM_API int trtllm_weight_only_gemm_supports(const trtllm_weight_only_gemm_params* params, int compute_capability);
TRTLLM_API int64_t trtllm_weight_only_gemm_workspace_bytes(const trtllm_weight_only_gemm_params* params);

#ifdef __cplusplus
}
#endif
#endif
