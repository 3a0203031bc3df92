// Products of a warp with tiles of packed weights in shared memory, by mma.m16n8k16, at activations of 16 bits as they
// are: what the persistent decode layer is made of.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "ptx.cuh"
#include "weight_only.hpp"
#include "weight_only_convert.cuh"

namespace trtllm::weight_only {

enum class Kind { kInt4, kInt8, kFp8, kDense };

__device__ __forceinline__ uint4 load_shared_16(uint32_t address) {
    uint4 v;
    asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(address));
    return v;
}
__device__ __forceinline__ uint2 load_shared_8(uint32_t address) {
    uint2 v;
    asm volatile("ld.shared.v2.u32 {%0,%1}, [%2];" : "=r"(v.x), "=r"(v.y) : "r"(address));
    return v;
}
__device__ __forceinline__ uint32_t load_shared_4(uint32_t address) {
    uint32_t v;
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(v) : "r"(address));
    return v;
}
__device__ __forceinline__ uint32_t load_shared_2(uint32_t address) {
    uint16_t v;
    asm volatile("ld.shared.u16 %0, [%1];" : "=h"(v) : "r"(address));
    return v;
}

template <typename T>
__device__ __forceinline__ float2 to_floats(uint32_t pair);
template <>
__device__ __forceinline__ float2 to_floats<__half>(uint32_t pair) {
    return __half22float2(*reinterpret_cast<const __half2*>(&pair));
}
template <>
__device__ __forceinline__ float2 to_floats<__nv_bfloat16>(uint32_t pair) {
    return {__uint_as_float(pair << 16), __uint_as_float(pair & 0xFFFF0000u)};
}
template <typename T>
__device__ __forceinline__ uint32_t to_pair(float low, float high);
template <>
__device__ __forceinline__ uint32_t to_pair<__half>(float low, float high) {
    const __half2 v = __floats2half2_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&v);
}
template <>
__device__ __forceinline__ uint32_t to_pair<__nv_bfloat16>(float low, float high) {
    const __nv_bfloat162 v = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&v);
}

// ---- one tile -----------------------------------------------------------------------------------------------------

// A lane's 16 bytes of x: two k16 steps for its token (see stage_x).
template <typename T>
__device__ __forceinline__ void two_steps(float (&d)[4], const uint32_t (&a)[8], const uint4& b) {
    const uint32_t first[4] = {a[0], a[1], a[2], a[3]};
    const uint32_t second[4] = {a[4], a[5], a[6], a[7]};
    ptx::mma_16816<T>(d, first, b.x, b.y);
    ptx::mma_16816<T>(d, second, b.z, b.w);
}

// acc[0], acc[1]: row lane / 4, tokens 2c and 2c + 1; acc[2], acc[3]: row lane / 4 + 8.
template <typename T, int Group>
__device__ __forceinline__ void add_int4_tile(float (&acc)[4], uint32_t tile, uint32_t x, uint32_t sums, int lane,
                                              bool has_zero) {
    constexpr int kGroups = 128 / Group;
    const uint4 low = load_shared_16(tile + lane * 16);
    const uint4 high = load_shared_16(tile + 512 + lane * 16);
    const uint32_t scales_at = tile + kTileWeightBytes + (lane / 4) * (4 * kGroups);
    const uint32_t zeros_at = tile + kTileWeightBytes + 32 * kGroups + (lane / 4) * (2 * kGroups);
    uint32_t scales[kGroups], zeros[kGroups];
    if constexpr (kGroups == 1) {
        scales[0] = load_shared_4(scales_at);
        zeros[0] = has_zero ? load_shared_2(zeros_at) : 0x0808u;
    } else if constexpr (kGroups == 2) {
        const uint2 s = load_shared_8(scales_at);
        scales[0] = s.x, scales[1] = s.y;
        const uint32_t z = has_zero ? load_shared_4(zeros_at) : 0x08080808u;
        zeros[0] = z, zeros[1] = z >> 16;
    } else {
        const uint4 s = load_shared_16(scales_at);
        scales[0] = s.x, scales[1] = s.y, scales[2] = s.z, scales[3] = s.w;
        const uint2 z = has_zero ? load_shared_8(zeros_at) : make_uint2(0x08080808u, 0x08080808u);
        zeros[0] = z.x, zeros[1] = z.x >> 16, zeros[2] = z.y, zeros[3] = z.y >> 16;
    }
    const uint32_t words[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
    float d[4];
#pragma unroll
    for (int t = 0; t < 4; ++t) {
        if (t % (Group / 32) == 0) d[0] = d[1] = d[2] = d[3] = 0.0f;
        const uint32_t w = words[t], u = words[4 + t];
        const uint32_t a[8] = {int4_pair<T, 0>(w), int4_pair<T, 0>(u), int4_pair<T, 1>(w), int4_pair<T, 1>(u),
                               int4_pair<T, 2>(w), int4_pair<T, 2>(u), int4_pair<T, 3>(w), int4_pair<T, 3>(u)};
        two_steps<T>(d, a, load_shared_16(x + t * 64));
        if ((t + 1) % (Group / 32) == 0) {
            // sum of (v - zero) x = kScale * d - (kOffset + zero) * sum of x
            const int g = t / (Group / 32);
            const float2 scale = __half22float2(*reinterpret_cast<const __half2*>(&scales[g]));
            const uint2 sum = load_shared_8(sums + g * 32);
            constexpr float kMagic = 8388608.0f;  // 2^23: a byte below it in the mantissa is that whole number
            const float zero0 = __uint_as_float(__byte_perm(zeros[g], 0x4B000000, 0x7650)) -
                                (kMagic - Int4Pair<T>::kOffset);
            const float zero1 = __uint_as_float(__byte_perm(zeros[g], 0x4B000000, 0x7651)) -
                                (kMagic - Int4Pair<T>::kOffset);
            const float off0 = -scale.x * zero0, off1 = -scale.y * zero1;
            const float s0 = scale.x * Int4Pair<T>::kScale, s1 = scale.y * Int4Pair<T>::kScale;
            acc[0] = fmaf(s0, d[0], fmaf(off0, __uint_as_float(sum.x), acc[0]));
            acc[1] = fmaf(s0, d[1], fmaf(off0, __uint_as_float(sum.y), acc[1]));
            acc[2] = fmaf(s1, d[2], fmaf(off1, __uint_as_float(sum.x), acc[2]));
            acc[3] = fmaf(s1, d[3], fmaf(off1, __uint_as_float(sum.y), acc[3]));
        }
    }
}

template <typename T, Kind K>
__device__ __forceinline__ void add_8bit_tile(float (&acc)[4], uint32_t tile, uint32_t x, int lane) {
    const uint4 low = load_shared_16(tile + lane * 16);
    const uint4 high = load_shared_16(tile + 512 + lane * 16);
    const uint32_t words[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
    for (int t = 0; t < 2; ++t) {
        uint32_t a[8];
#pragma unroll
        for (int s = 0; s < 2; ++s) {
            const uint32_t w = words[2 * t + s], u = words[4 + 2 * t + s];
            a[4 * s + 0] = K == Kind::kInt8 ? int8_pair<T, 0>(w) : fp8_pair<T, 0>(w);
            a[4 * s + 1] = K == Kind::kInt8 ? int8_pair<T, 0>(u) : fp8_pair<T, 0>(u);
            a[4 * s + 2] = K == Kind::kInt8 ? int8_pair<T, 1>(w) : fp8_pair<T, 1>(w);
            a[4 * s + 3] = K == Kind::kInt8 ? int8_pair<T, 1>(u) : fp8_pair<T, 1>(u);
        }
        two_steps<T>(acc, a, load_shared_16(x + t * 64));
    }
}

// ---- activations and results ----

__device__ __forceinline__ float warp_sum(float v) {
#pragma unroll
    for (int step = 16; step > 0; step /= 2) v += __shfl_xor_sync(0xFFFFFFFFu, v, step);
    return v;
}

template <typename T>
__device__ __forceinline__ float square_sum(const uint4& v) {
    const float2 a = to_floats<T>(v.x), b = to_floats<T>(v.y), c = to_floats<T>(v.z), d = to_floats<T>(v.w);
    return ((a.x * a.x + a.y * a.y) + (b.x * b.x + b.y * b.y)) + ((c.x * c.x + c.y * c.y) + (d.x * d.x + d.y * d.y));
}

__device__ __forceinline__ float activate(float x, int gate) {
    if (gate == 1) return x / (1.0f + __expf(-x));
    if (gate == 2) return 0.5f * x * (1.0f + erff(x * 0.70710678118654752f));
    return 0.5f * x * (1.0f + tanhf(0.79788456080286536f * (x + 0.044715f * x * x * x)));
}

}  // namespace trtllm::weight_only
