// A tile of weights in shared memory times the activations of its inputs.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <type_traits>

#include "ptx.cuh"
#include "weight_only.hpp"
#include "weight_only_products.cuh"

namespace trtllm::weight_only {

template <Kind K>
constexpr int kDepth = K == Kind::kInt4 || K == Kind::kDense ? 128 : 64;  // inputs of a tile
constexpr int kDenseTileBytes = 4096;

// Activations are multiplied as they are, or (kScaled, packed weights) as float16 numbers times a power of two for each
// tile and token: then weights of any kind become float16, which takes fewer instructions, and converting the
// activations more.
//
// What a tile keeps of the activations besides themselves, floats [kRecords][8 tokens]: int4 for each group, int8
// scaled once, where its sums start (codes are stored above their value); last, scaled, what multiplies its sums.
template <Kind K, int Group, bool Scaled>
constexpr int kRecords = (K == Kind::kInt4 ? 128 / Group : K == Kind::kInt8 && Scaled ? 1 : 0) + (Scaled ? 1 : 0);

// What sums are to be multiplied with at the end, for weights that lie in float16's subnormal numbers.
template <typename T, Kind K, bool Scaled>
constexpr float kStored = K == Kind::kInt4   ? Scaled ? 2097152.0f : Int4Pair<T>::kScale
                          : K == Kind::kInt8 ? Scaled ? 16777216.0f : 1.0f
                          : K == Kind::kFp8  ? Scaled ? 256.0f : kFp8Scale<T>
                                             : 1.0f;

// A group's, or int8's, sum of activations times this is where the sums of products start.
template <typename T, Kind K, bool Scaled>
constexpr float kStart =
    -(K == Kind::kInt8 ? 128.0f : Scaled ? 8.0f : Int4Pair<T>::kOffset + 8.0f) / kStored<T, K, Scaled>;

// d += a * b; not volatile: the compiler may move it among loads.
template <typename T>
__device__ __forceinline__ void multiply(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                                         uint32_t b1) {
    if constexpr (std::is_same_v<T, __half>) {
        asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
            : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
    } else {
        asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
            : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
    }
}

__device__ __forceinline__ void load_matrices(uint32_t (&r)[4], uint32_t address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
        : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
        : "r"(address));
}

// A pair in shared memory, not before the compiler comes to this place: it takes no registers until then.
__device__ __forceinline__ float2 load_now(const float* from) {
    float2 v;
    asm volatile("ld.shared.v2.f32 {%0,%1}, [%2];" : "=f"(v.x), "=f"(v.y) : "r"(ptx::shared_address(from)));
    return v;
}

__device__ __forceinline__ float2 half_pair(uint32_t bits) {
    return __half22float2(*reinterpret_cast<const __half2*>(&bits));
}

// acc[0], acc[1]: row lane / 4, tokens 2c and 2c + 1; acc[2], acc[3]: row lane / 4 + 8. `x`: the lane's address for
// ldmatrix; `records`: those of its tokens.
//
// A word's eight values become float16 with five instructions: nibbles in bits 3..6 are v * 2^-21, in bits 7..10
// v * 2^-17 (subnormals and the exponent above them lie equally far apart), and a turn by 8 bits brings the other four
// there. Inputs of the latter are stored 2^-4 smaller.
template <typename T, int Group, bool Scaled>
__device__ __forceinline__ void add_int4(float (&acc)[4], const char* tile, uint32_t x, const float* records, int lane,
                                         bool has_zero) {
    constexpr int kGroups = 128 / Group;
    constexpr uint32_t kLow = 0x00780078, kHigh = 0x07800780;
    uint32_t words[8];
    const auto load_words = [&](int first) {
        if constexpr (kGroups == 1) {
            if (first != 0) return;
            const uint4 low = *reinterpret_cast<const uint4*>(tile + lane * 16);
            const uint4 high = *reinterpret_cast<const uint4*>(tile + 512 + lane * 16);
            words[0] = low.x, words[1] = low.y, words[2] = low.z, words[3] = low.w;
            words[4] = high.x, words[5] = high.y, words[6] = high.z, words[7] = high.w;
        } else {
            // by halves, as more groups need more registers
            const uint2 low = *reinterpret_cast<const uint2*>(tile + lane * 16 + 4 * first);
            const uint2 high = *reinterpret_cast<const uint2*>(tile + 512 + lane * 16 + 4 * first);
            words[first] = low.x, words[first + 1] = low.y, words[first + 4] = high.x, words[first + 5] = high.y;
        }
    };
    const char* const scales = tile + kTileWeightBytes + (lane / 4) * (4 * kGroups);
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
        const float2 start = *reinterpret_cast<const float2*>(records + g * 8);
        // two chains of dependent products where a group is all of the tile, else the groups are that
        float even[4] = {start.x, start.y, start.x, start.y}, second[4] = {};
        float(&odd)[4] = kGroups == 1 ? second : even;
#pragma unroll
        for (int t = g * 4 / kGroups; t < (g + 1) * 4 / kGroups; ++t) {
            if (t % 2 == 0) load_words(t);
            uint32_t b[4];
            load_matrices(b, x + t * 64);
            const uint32_t w = words[t], u = words[4 + t];
            if constexpr (Scaled) {
                const uint32_t v = __funnelshift_r(w, w, 8), s = __funnelshift_r(u, u, 8);
                multiply<__half>(even, w & kLow, u & kLow, w & kHigh, u & kHigh, b[0], b[1]);
                multiply<__half>(odd, v & kLow, s & kLow, v & kHigh, s & kHigh, b[2], b[3]);
            } else {
                multiply<T>(even, int4_pair<T, 0>(w), int4_pair<T, 0>(u), int4_pair<T, 1>(w), int4_pair<T, 1>(u), b[0],
                            b[1]);
                multiply<T>(odd, int4_pair<T, 2>(w), int4_pair<T, 2>(u), int4_pair<T, 3>(w), int4_pair<T, 3>(u), b[2],
                            b[3]);
            }
        }
        const float2 scale = half_pair(*reinterpret_cast<const uint32_t*>(scales + 4 * g));
        if (has_zero) {
            // `start` takes zeros to be 8: (v - z) = (v - 8) + (8 - z)
            const char* at = tile + kTileWeightBytes + 32 * kGroups + (lane / 4) * (2 * kGroups) + 2 * g;
            const uint32_t zeros = *reinterpret_cast<const uint16_t*>(at);
            constexpr float kOne = -1.0f / (kStored<T, Kind::kInt4, Scaled> * kStart<T, Kind::kInt4, Scaled>);
            const float z0 = (float(zeros & 255) - 8.0f) * kOne, z1 = (float(zeros >> 8) - 8.0f) * kOne;
            odd[0] = fmaf(z0, start.x, odd[0]), odd[1] = fmaf(z0, start.y, odd[1]);
            odd[2] = fmaf(z1, start.x, odd[2]), odd[3] = fmaf(z1, start.y, odd[3]);
        }
        float2 by = {1.0f, 1.0f};
        if constexpr (Scaled) by = load_now(records + kGroups * 8);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const float sum = kGroups == 1 ? even[i] + odd[i] : even[i];
            acc[i] = fmaf((i < 2 ? scale.x : scale.y) * (i % 2 == 0 ? by.x : by.y), sum, acc[i]);
        }
    }
}

// int8 scaled: codes, 128 above the weights, are the float16 subnormals code * 2^-24.
template <typename T, Kind K, bool Scaled>
__device__ __forceinline__ void add_8bit(float (&acc)[4], const char* tile, uint32_t x, const float* records,
                                         int lane) {
    const uint4 low = *reinterpret_cast<const uint4*>(tile + lane * 16);
    const uint4 high = *reinterpret_cast<const uint4*>(tile + 512 + lane * 16);
    const uint32_t words[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
    float even[4] = {}, odd[4] = {};
    if constexpr (K == Kind::kInt8 && Scaled) {
        const float2 start = *reinterpret_cast<const float2*>(records);
        even[0] = even[2] = start.x, even[1] = even[3] = start.y;
    }
#pragma unroll
    for (int t = 0; t < 2; ++t) {
        uint32_t b[4];
        load_matrices(b, x + t * 64);
#pragma unroll
        for (int s = 0; s < 2; ++s) {
            const uint32_t w = words[2 * t + s], u = words[4 + 2 * t + s];
            float(&d)[4] = s ? odd : even;
            using Number = std::conditional_t<Scaled, __half, T>;
            if constexpr (K == Kind::kFp8) {
                multiply<Number>(d, fp8_pair<Number, 0>(w), fp8_pair<Number, 0>(u), fp8_pair<Number, 1>(w),
                                 fp8_pair<Number, 1>(u), b[2 * s], b[2 * s + 1]);
            } else if constexpr (Scaled) {
                multiply<__half>(d, __byte_perm(w, 0, 0x4240), __byte_perm(u, 0, 0x4240), __byte_perm(w, 0, 0x4341),
                                 __byte_perm(u, 0, 0x4341), b[2 * s], b[2 * s + 1]);
            } else {
                multiply<T>(d, int8_pair<T, 0>(w), int8_pair<T, 0>(u), int8_pair<T, 1>(w), int8_pair<T, 1>(u), b[2 * s],
                            b[2 * s + 1]);
            }
        }
    }
    float2 by = {1.0f, 1.0f};
    if constexpr (Scaled) by = *reinterpret_cast<const float2*>(records + (kRecords<K, 128, true> - 1) * 8);
    acc[0] = fmaf(even[0] + odd[0], by.x, acc[0]), acc[1] = fmaf(even[1] + odd[1], by.y, acc[1]);
    acc[2] = fmaf(even[2] + odd[2], by.x, acc[2]), acc[3] = fmaf(even[3] + odd[3], by.y, acc[3]);
}

// 16 rows x 128 inputs, 16-byte chunk j of row r at r * 256 + (j ^ r % 8) * 16: eight rows lie in different banks.
template <typename T>
__device__ __forceinline__ void add_dense(float (&acc)[4], float (&odd)[4], uint32_t tile, uint32_t x, int lane) {
    const uint32_t row = tile + lane % 16 * 256;
#pragma unroll
    for (int t = 0; t < 4; ++t) {
        uint32_t b[4], a[4], c[4];
        load_matrices(b, x + t * 64);
        load_matrices(a, row + ((4 * t + lane / 16) ^ lane % 8) * 16);
        load_matrices(c, row + ((4 * t + 2 + lane / 16) ^ lane % 8) * 16);
        multiply<T>(acc, a[0], a[1], a[2], a[3], b[0], b[1]);
        multiply<T>(odd, c[0], c[1], c[2], c[3], b[2], b[3]);
    }
}

}  // namespace trtllm::weight_only
