// What the attention kernels of the context phase share: where a sequence's rows lie, which keys a query sees, and the
// online softmax on accumulator fragments.
// Sources: Milakov and Gimelshein 2018 (online softmax); Dao 2023 (FlashAttention-2: one rescaling of the sums a tile).
#pragma once

#include "ptx.cuh"
#include "trtllm_kernels/fmha.h"

namespace trtllm::fmha {

constexpr float kLog2e = 1.4426950408889634f;

struct Sequence {
    int q_begin;     // first row in q
    int q_length;
    int kv_begin;    // first row in k and v, packed
    int kv_length;
    int shift;       // query i stands at position i + shift; negative where there are more queries than keys

    __device__ Sequence(const trtllm_fmha_params& p, int b) {
        q_begin = p.q_starts[b];
        q_length = p.q_starts[b + 1] - q_begin;
        if (p.page_table != nullptr) {
            kv_begin = 0;
            kv_length = p.kv_lengths[b];
        } else {
            kv_begin = p.kv_starts[b];
            kv_length = p.kv_starts[b + 1] - kv_begin;
        }
        shift = kv_length - q_length;
    }
};

// Tiles of keys [first, end) that some query of rows [row, row + rows) sees.
struct TileRange {
    int first, end;

    __device__ TileRange(const trtllm_fmha_params& p, const Sequence& s, int row, int rows, int tile) {
        const int last_row = min(row + rows, s.q_length) - 1;
        const int keys = p.causal ? min(s.kv_length, last_row + s.shift + 1) : s.kv_length;
        end = keys > 0 ? (keys + tile - 1) / tile : 0;
        first = p.window > 0 ? max(0, row + s.shift - p.window + 1) / tile : 0;
        first = min(first, end);
    }
};

template <typename T>
__device__ __forceinline__ uint32_t pack(float low, float high);
template <>
__device__ __forceinline__ uint32_t pack<__half>(float low, float high) {
    const __half2 both = __floats2half2_rn(low, high);
    return reinterpret_cast<const uint32_t&>(both);
}
template <>
__device__ __forceinline__ uint32_t pack<__nv_bfloat16>(float low, float high) {
    const __nv_bfloat162 both = __floats2bfloat162_rn(low, high);
    return reinterpret_cast<const uint32_t&>(both);
}

__device__ __forceinline__ float exp2_approx(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// tanh by one exponential and one division: tanh.approx errs by 5e-4, which a cap of 50 makes 0.025 in an exponent
__device__ __forceinline__ float tanh_fast(float x) {
    return 1.0f - __fdividef(2.0f, 1.0f + exp2_approx(fminf(x * (2.0f * kLog2e), 126.0f)));
}

// Soft cap and ALiBi on a fragment of scores, which leave as exponents of 2: [N / 8][4] with the columns of a thread at
// 8 i + 2 (lane % 4) + {0, 1} and its rows at lane / 4 and lane / 4 + 8 (PTX ISA, fragments of mma.m16n8 and wgmma),
// queries at `position` and `position + apart`.
template <int N>
__device__ __forceinline__ void shape_scores(float (&s)[N][4], const trtllm_fmha_params& p, float slope, int column,
                                             int position, int apart = 8) {
    const float inner = p.soft_cap > 0.0f ? p.scale / p.soft_cap : p.scale * kLog2e;
    const float outer = p.soft_cap * kLog2e;
    slope *= kLog2e;
#pragma unroll
    for (int i = 0; i < N; ++i) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
            float x = s[i][e] * inner;
            if (p.soft_cap > 0.0f) x = tanh_fast(x) * outer;
            const int distance = column + 8 * i + (e & 1) - (position + (e / 2) * apart);
            s[i][e] = fmaf(slope, float(distance), x);
        }
    }
}

// Minus infinity where the thread's queries (positions `position` and `position + apart`) see no key; `column` is the key
// of element 0. `low` is exclusive: keys at or below position - window are hidden.
template <int N>
__device__ __forceinline__ void hide(float (&s)[N][4], int column, int position, int apart, int kv_length,
                                     bool causal, int window) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int at = position + apart * half;
        const int end = (causal ? min(kv_length, at + 1) : kv_length) - column;
        const int low = window > 0 ? at - window - column : -1 - column;
#pragma unroll
        for (int i = 0; i < N; ++i) {
#pragma unroll
            for (int e = 0; e < 2; ++e) {
                const int offset = 8 * i + e;
                if (offset >= end || offset <= low) s[i][2 * half + e] = -INFINITY;
            }
        }
    }
}

// Running maximum and sum of a thread's two rows. Sums stay partial (the thread's own columns) until `finish`.
struct Softmax {
    float max[2] = {-INFINITY, -INFINITY};
    float sum[2] = {0.0f, 0.0f};

    // Turns scores into weights exp2(c s - c max) and gives the factors by which earlier sums must shrink.
    template <int N>
    __device__ __forceinline__ void step(float (&s)[N][4], float c, float (&shrink)[2]) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            // four chains, so that the comparisons do not wait for each other
            float best[4] = {max[half], s[0][2 * half + 1], s[1][2 * half], s[1][2 * half + 1]};
            best[0] = fmaxf(best[0], s[0][2 * half]);
#pragma unroll
            for (int i = 2; i < N; i += 2) {
                best[0] = fmaxf(best[0], s[i][2 * half]);
                best[1] = fmaxf(best[1], s[i][2 * half + 1]);
                best[2] = fmaxf(best[2], s[i + 1][2 * half]);
                best[3] = fmaxf(best[3], s[i + 1][2 * half + 1]);
            }
            float most = fmaxf(fmaxf(best[0], best[1]), fmaxf(best[2], best[3]));
            most = fmaxf(most, __shfl_xor_sync(0xffffffff, most, 1));
            most = fmaxf(most, __shfl_xor_sync(0xffffffff, most, 2));
            // a row that has seen nothing yet: any finite offset, so that exp2(-inf - offset) is 0 and not NaN
            const float offset = most == -INFINITY ? 0.0f : most * c;
            shrink[half] = exp2_approx(fmaf(max[half], c, -offset));
            max[half] = most;
            float total[2] = {0.0f, 0.0f};
#pragma unroll
            for (int i = 0; i < N; ++i) {
#pragma unroll
                for (int e = 0; e < 2; ++e) {
                    const float weight = exp2_approx(fmaf(s[i][2 * half + e], c, -offset));
                    s[i][2 * half + e] = weight;
                    total[e] += weight;
                }
            }
            sum[half] = fmaf(sum[half], shrink[half], total[0] + total[1]);
        }
    }

    // Gives 1 / sum of each row (0 where it saw nothing) and its log-sum-exp in nats.
    __device__ __forceinline__ void finish(float c, float (&inverse)[2], float (&lse)[2]) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            float total = sum[half];
            total += __shfl_xor_sync(0xffffffff, total, 1);
            total += __shfl_xor_sync(0xffffffff, total, 2);
            inverse[half] = total > 0.0f ? 1.0f / total : 0.0f;
            lse[half] = total > 0.0f ? (max[half] * c + log2f(total)) / kLog2e : -INFINITY;
        }
    }
};

}  // namespace trtllm::fmha
