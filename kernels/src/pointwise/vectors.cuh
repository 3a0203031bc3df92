// Device side of the pointwise kernels: vectors in and out of memory, quantization to 8 bits, sums over a row.
#pragma once

#include <cuda_fp8.h>

#include <type_traits>

#include "ptx.cuh"
#include "trtllm_kernels/common.h"

namespace trtllm::pointwise {

// Elements of T in 16 bytes: what a thread moves at once where rows are aligned for it.
template <typename T>
constexpr int kVector = 16 / int(sizeof(T));

// V elements as they lie in memory. In words of 4 bytes where there are that many: held as halves, each would take a
// register of its own.
template <typename T, int V>
struct Pack {
    using Word = std::conditional_t<V * sizeof(T) % 4 == 0, uint32_t, T>;
    alignas(V * sizeof(T)) Word at[V * sizeof(T) / sizeof(Word)];
};

template <typename T, int V>
__device__ __forceinline__ Pack<T, V> load(const T* from) {
    return *reinterpret_cast<const Pack<T, V>*>(from);
}

template <typename T, int V>
__device__ __forceinline__ void widen(float (&to)[V], const Pack<T, V>& from) {
    if constexpr (V * sizeof(T) % 4 != 0) {
#pragma unroll
        for (int i = 0; i < V; ++i) to[i] = float(from.at[i]);
    } else {
#pragma unroll
        for (int i = 0; i < V; ++i) {
            const uint32_t word = from.at[i * sizeof(T) / 4];
            if constexpr (std::is_same_v<T, float>) {
                to[i] = __uint_as_float(word);
            } else if constexpr (std::is_same_v<T, __nv_bfloat16>) {
                to[i] = __uint_as_float(i % 2 == 0 ? word << 16 : word & 0xffff0000u);
            } else if constexpr (std::is_same_v<T, __half>) {
                to[i] = __half2float(__ushort_as_half(uint16_t(i % 2 == 0 ? word : word >> 16)));
            } else {
                to[i] = float(int8_t(word >> (i % 4 * 8)));
            }
        }
    }
}

// To the nearest, ties to even.
template <typename T, int V>
__device__ __forceinline__ Pack<T, V> rounded(const float (&from)[V]) {
    Pack<T, V> to;
    if constexpr (std::is_same_v<T, float>) {
#pragma unroll
        for (int i = 0; i < V; ++i) to.at[i] = __float_as_uint(from[i]);
    } else if constexpr (V % 2 == 0) {
#pragma unroll
        for (int i = 0; i < V; i += 2) {
            if constexpr (std::is_same_v<T, __half>) {
                const __half2 two = __floats2half2_rn(from[i], from[i + 1]);
                to.at[i / 2] = reinterpret_cast<const uint32_t&>(two);
            } else {
                const __nv_bfloat162 two = __floats2bfloat162_rn(from[i], from[i + 1]);
                to.at[i / 2] = reinterpret_cast<const uint32_t&>(two);
            }
        }
    } else {
#pragma unroll
        for (int i = 0; i < V; ++i) to.at[i] = T(from[i]);
    }
    return to;
}

template <typename T, int V>
__device__ __forceinline__ void store(T* to, const float (&from)[V]) {
    *reinterpret_cast<Pack<T, V>*>(to) = rounded<T, V>(from);
}

// ---- quantization -------------------------------------------------------------------------------------------------

// x / scale, correctly rounded without a division each: a reciprocal, a product and one correction by its remainder
// (Markstein, 1990). A kernel then gives the very integers that the definition in torch gives.
struct Divisor {
    float scale, inverse;
    __device__ __forceinline__ explicit Divisor(float by) {
        scale = by;
        inverse = __frcp_rn(by);
    }
    __device__ __forceinline__ float operator()(float x) const {
        const float q = x * inverse;
        return __fmaf_rn(__fmaf_rn(-q, scale, x), inverse, q);
    }
};

// Nearest whole number in low..127 as a byte: adding 1.5 * 2^23 leaves it, rounded to even, in the low mantissa bits.
__device__ __forceinline__ uint32_t int8_bits(float x, float low) {
    return __float_as_uint(fminf(fmaxf(x, low), 127.0f) + 12582912.0f);
}

template <int V>
__device__ __forceinline__ void store_int8(void* to, const float (&x)[V], float low) {
    if constexpr (V >= 4) {
        Pack<uint32_t, V / 4> words;
#pragma unroll
        for (int i = 0; i < V; i += 4) {
            const uint32_t a = __byte_perm(int8_bits(x[i], low), int8_bits(x[i + 1], low), 0x0040);
            const uint32_t b = __byte_perm(int8_bits(x[i + 2], low), int8_bits(x[i + 3], low), 0x0040);
            words.at[i / 4] = __byte_perm(a, b, 0x5410);
        }
        *static_cast<Pack<uint32_t, V / 4>*>(to) = words;
    } else {
#pragma unroll
        for (int i = 0; i < V; ++i) static_cast<uint8_t*>(to)[i] = uint8_t(int8_bits(x[i], low));
    }
}

template <int V>
__device__ __forceinline__ void store_fp8(void* to, const float (&x)[V]) {
    if constexpr (V >= 4) {
        Pack<uint32_t, V / 4> words;
#pragma unroll
        for (int i = 0; i < V; i += 4) {
            const uint32_t a = __nv_cvt_float2_to_fp8x2({x[i], x[i + 1]}, __NV_SATFINITE, __NV_E4M3);
            const uint32_t b = __nv_cvt_float2_to_fp8x2({x[i + 2], x[i + 3]}, __NV_SATFINITE, __NV_E4M3);
            words.at[i / 4] = a | b << 16;
        }
        *static_cast<Pack<uint32_t, V / 4>*>(to) = words;
    } else {
#pragma unroll
        for (int i = 0; i < V; ++i) {
            static_cast<uint8_t*>(to)[i] = __nv_cvt_float_to_fp8(x[i], __NV_SATFINITE, __NV_E4M3);
        }
    }
}

// V values already divided by their scale.
template <int V>
__device__ __forceinline__ void store_8bit(void* to, const float (&x)[V], bool int8, float low = -128.0f) {
    if (int8) {
        store_int8(to, x, low);
    } else {
        store_fp8(to, x);
    }
}

// The scale of a row whose largest magnitude is given: as token_scales of trtllm_cli/ops/quantized.py.
__device__ __forceinline__ float token_scale(float largest, bool int8) {
    const float top = int8 ? 127.0f : 448.0f;
    return largest > 1.17549435e-38f * top ? __fdiv_rn(largest, top) : 1.0f;
}

// ---- over a row ---------------------------------------------------------------------------------------------------

struct Sum {
    static constexpr float kNone = 0.0f;
    __device__ static float of(float a, float b) { return a + b; }
};
struct Largest {
    static constexpr float kNone = 0.0f;  // of magnitudes
    __device__ static float of(float a, float b) { return fmaxf(a, b); }
};

template <typename Op>
__device__ __forceinline__ float over_warp(float x) {
#pragma unroll
    for (int step = 16; step > 0; step /= 2) x = Op::of(x, __shfl_xor_sync(~0u, x, step));
    return x;
}

// Over the blockDim.x threads of a row, a whole number of warps; more than one only where the block has one row. The
// order is fixed. `shared` holds 32 floats that no other reduction of this kernel uses.
template <typename Op>
__device__ __forceinline__ float over_row(float x, float* shared) {
    x = over_warp<Op>(x);
    if (blockDim.x == 32) return x;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    if (lane == 0) shared[warp] = x;
    __syncthreads();
    return over_warp<Op>(lane < blockDim.x / 32 ? shared[lane] : Op::kNone);
}

}  // namespace trtllm::pointwise
