// A head's row of the fused projection, held by one warp: norm, rotary embedding, rounding.
#pragma once

#include "mmha_convert.cuh"
#include "trtllm_kernels/mmha.h"

namespace trtllm::mmha {

__device__ __forceinline__ float warp_sum(float x) {
    for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(~0u, x, step);
    return x;
}
__device__ __forceinline__ float warp_max(float x) {
    for (int step = 16; step > 0; step /= 2) x = fmaxf(x, __shfl_xor_sync(~0u, x, step));
    return x;
}

// Lane l holds items l, l + 32 ...: two vectors of two elements, which start at `first` and `second`. Where the
// rotation pairs halves these are half a rotary dimension apart, everywhere else they are neighbours; so both elements
// that a rotation mixes are in one lane.
template <int D>
struct Row {
    static constexpr int kItems = (D / 4 + 31) / 32;
    float x[kItems][2], y[kItems][2];

    static __device__ __forceinline__ bool has(int n) { return threadIdx.x % 32 + 32 * n < D / 4; }
    static __device__ __forceinline__ int first(int n, int half) {
        const int item = threadIdx.x % 32 + 32 * n;
        return 2 * item < half ? 2 * item : 4 * item;
    }
    static __device__ __forceinline__ int second(int n, int half) {
        const int item = threadIdx.x % 32 + 32 * n;
        return 2 * item < half ? 2 * item + half : 4 * item + 2;
    }

    // `half` is half the rotary dimension where rotation pairs halves, else 0
    __device__ __forceinline__ void load(const void* row, int half, bool bfloat16) {
        const uint16_t* from = static_cast<const uint16_t*>(row);
#pragma unroll
        for (int n = 0; n < kItems; ++n) {
            float2 a{}, b{};
            if (has(n)) {
                a = widen(*reinterpret_cast<const uint32_t*>(from + first(n, half)), bfloat16);
                b = widen(*reinterpret_cast<const uint32_t*>(from + second(n, half)), bfloat16);
            }
            x[n][0] = a.x, x[n][1] = a.y, y[n][0] = b.x, y[n][1] = b.y;
        }
    }

    __device__ __forceinline__ void normalise(const Row& weights, const trtllm_mmha_params& p) {
        float squares = 0.0f;
#pragma unroll
        for (int n = 0; n < kItems; ++n) {
            squares += x[n][0] * x[n][0] + x[n][1] * x[n][1] + y[n][0] * y[n][0] + y[n][1] * y[n][1];
        }
        const float factor = rsqrtf(warp_sum(squares) / float(D) + p.norm_eps);
#pragma unroll
        for (int n = 0; n < kItems; ++n) {
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                x[n][i] *= factor * (weights.x[n][i] + p.norm_offset);
                y[n][i] *= factor * (weights.y[n][i] + p.norm_offset);
            }
        }
    }

    // cosines in x, sines in y: those of this lane's items at a position
    __device__ __forceinline__ void load_angles(int position, const trtllm_mmha_params& p) {
        const int pairs = p.rotary_dim / 2;
        const int64_t at = min(int64_t(max(position, 0)), p.rotary_positions - 1) * pairs;
#pragma unroll
        for (int n = 0; n < kItems; ++n) {
            const int item = threadIdx.x % 32 + 32 * n;
            float2 c{}, s{};
            if (2 * item < pairs) {
                c = *reinterpret_cast<const float2*>(p.cos + at + 2 * item);
                s = *reinterpret_cast<const float2*>(p.sin + at + 2 * item);
            }
            x[n][0] = c.x, x[n][1] = c.y, y[n][0] = s.x, y[n][1] = s.y;
        }
    }

    __device__ __forceinline__ void rotate(const Row& angles, const trtllm_mmha_params& p) {
#pragma unroll
        for (int n = 0; n < kItems; ++n) {
            const int item = threadIdx.x % 32 + 32 * n;
            if (4 * item >= p.rotary_dim) continue;
            const auto turn = [](float& a, float& b, float cos, float sin) {
                // rounded as separate operations are, which is what the twin does
                const float kept = a;
                a = __fsub_rn(__fmul_rn(kept, cos), __fmul_rn(b, sin));
                b = __fadd_rn(__fmul_rn(b, cos), __fmul_rn(kept, sin));
            };
            const float(&c)[2] = angles.x[n], (&s)[2] = angles.y[n];
            if (p.interleaved) {
                turn(x[n][0], x[n][1], c[0], s[0]);
                turn(y[n][0], y[n][1], c[1], s[1]);
            } else {
                turn(x[n][0], y[n][0], c[0], s[0]);
                turn(x[n][1], y[n][1], c[1], s[1]);
            }
        }
    }

    // As the left operand's partner: rounded to q's type, and as `T` into shared memory. Where T is another type than
    // q's (8-bit caches) the row is first divided by a power of two that brings it below 2; what it must be multiplied
    // by.
    template <typename T>
    __device__ __forceinline__ float store_query(T* row, int half, bool scaled, bool bfloat16) {
        float factor = 1.0f, inverse = 1.0f;
        if (scaled) {
            float largest = 0.0f;
#pragma unroll
            for (int n = 0; n < kItems; ++n) {
#pragma unroll
                for (int i = 0; i < 2; ++i) largest = fmaxf(largest, fmaxf(fabsf(x[n][i]), fabsf(y[n][i])));
            }
            // the exponent alone, kept where its reciprocal is normal
            const int exponent = min(max(int(__float_as_uint(warp_max(largest)) >> 23), 1), 253);
            factor = __uint_as_float(uint32_t(exponent) << 23);
            inverse = __uint_as_float(uint32_t(254 - exponent) << 23);
        }
#pragma unroll
        for (int n = 0; n < kItems; ++n) {
            if (!has(n)) continue;
            const float2 a = widen(narrow(x[n][0], x[n][1], bfloat16), bfloat16);
            const float2 b = widen(narrow(y[n][0], y[n][1], bfloat16), bfloat16);
            *reinterpret_cast<uint32_t*>(row + first(n, half)) = pack<T>(a.x * inverse, a.y * inverse);
            *reinterpret_cast<uint32_t*>(row + second(n, half)) = pack<T>(b.x * inverse, b.y * inverse);
        }
        return factor;
    }

    // Into the cache (unless that is null) and into `kept`, in the cache's type.
    template <typename C>
    __device__ __forceinline__ void store_cached(C* cache, C* kept, int half, const Divisor& divisor) const {
#pragma unroll
        for (int n = 0; n < kItems; ++n) {
            if (!has(n)) continue;
#pragma unroll
            for (int which = 0; which < 2; ++which) {
                const int at = which ? second(n, half) : first(n, half);
                const float(&v)[2] = which ? y[n] : x[n];
                if constexpr (Cached<C>::kBytes == 2) {
                    const uint32_t both = pack<C>(v[0], v[1]);
                    if (cache != nullptr) *reinterpret_cast<uint32_t*>(cache + at) = both;
                    *reinterpret_cast<uint32_t*>(kept + at) = both;
                } else {
                    const uint16_t both = Cached<C>::round_two(v[0], v[1], divisor);
                    if (cache != nullptr) *reinterpret_cast<uint16_t*>(cache + at) = both;
                    *reinterpret_cast<uint16_t*>(kept + at) = both;
                }
            }
        }
    }
};

}  // namespace trtllm::mmha
