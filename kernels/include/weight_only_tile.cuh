// What the tensor-core kernels of the weight-only product share on the device: a packed tile turned into operand
// fragments, and what is done to the sums. The layout is described in trtllm_kernels/weight_only.h.
#pragma once

#include <type_traits>
#include <utility>

#include "ptx.cuh"
#include "trtllm_kernels/weight_only.h"
#include "weight_only_convert.cuh"

namespace trtllm::weight_only {

/// Inputs in one stage of the pipelines: a tile of int4, two of 8 bits.
constexpr int kStageDepth = 128;

enum class Weight { kInt4, kInt8, kFp8 };

/// What the kernels need to know, the same for every block.
struct TensorArguments {
    const void* bias;
    const void* residual;
    const float* scale;
    void* out;
    int64_t residual_stride, out_stride;
    int32_t m, n, outputs, k;
    int32_t stages;        // ceil(K / kStageDepth)
    int32_t stripe_bytes;  // of one stripe in one stage: 1024 + scales + zeros (int4), 2048
    int32_t group_shift;   // int4: log2 of (group / 32)
    int32_t has_zero;
    int32_t gate;
    int32_t pdl;
    int32_t vector;        // rows of out and residual may be accessed 16 bytes at a time
    float multiplier;
};

template <typename Body, int... I>
__device__ __forceinline__ void unroll_over(Body& body, std::integer_sequence<int, I...>) {
    (body(std::integral_constant<int, I>()), ...);
}
// body(0), body(1), ..., body(Count - 1) with compile-time arguments.
template <int Count, typename Body>
__device__ __forceinline__ void unroll(Body& body) {
    unroll_over(body, std::make_integer_sequence<int, Count>());
}

template <typename T>
__device__ __forceinline__ uint32_t multiply_pairs(uint32_t a, uint32_t b);
template <>
__device__ __forceinline__ uint32_t multiply_pairs<__half>(uint32_t a, uint32_t b) {
    uint32_t d;
    asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
    return d;
}
template <>
__device__ __forceinline__ uint32_t multiply_pairs<__nv_bfloat16>(uint32_t a, uint32_t b) {
    uint32_t d;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(0x80008000u));
    return d;
}
// a + b for values whose sum is exact.
template <typename T>
__device__ __forceinline__ uint32_t add_pairs(uint32_t a, uint32_t b);
template <>
__device__ __forceinline__ uint32_t add_pairs<__half>(uint32_t a, uint32_t b) {
    uint32_t d;
    asm("add.rn.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
    return d;
}
template <>
__device__ __forceinline__ uint32_t add_pairs<__nv_bfloat16>(uint32_t a, uint32_t b) {
    uint32_t d;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(0x3F803F80u), "r"(b));
    return d;
}

// Nibbles in mantissa bits 3..6 become kBase + v, which 16-bit types of both kinds hold exactly.
template <typename T>
struct NibbleBits;
template <>
struct NibbleBits<__nv_bfloat16> {
    static constexpr uint32_t kBits = 0x41804180;  // 16 + v
};
template <>
struct NibbleBits<__half> {
    static constexpr uint32_t kBits = 0x58005800;  // 128 + v
};

__device__ __forceinline__ uint32_t word_of(const uint4& v, int i) {
    return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w;
}

// A step's fragment of 8-bit weights: words of rows g and g + 8.
template <typename T, Weight kWeight>
__device__ __forceinline__ void eight_fragment(uint32_t (&f)[4], uint32_t low, uint32_t high) {
    if constexpr (kWeight == Weight::kInt8) {
        f[0] = int8_pair<T, 0>(low), f[1] = int8_pair<T, 0>(high);
        f[2] = int8_pair<T, 1>(low), f[3] = int8_pair<T, 1>(high);
    } else {
        f[0] = fp8_pair<T, 0>(low), f[1] = fp8_pair<T, 0>(high);
        f[2] = fp8_pair<T, 1>(low), f[3] = fp8_pair<T, 1>(high);
    }
}

/// A warp's stripe of one stage as it comes from shared memory, and the scales in use.
template <typename T, Weight kWeight>
struct StripeTile;

template <typename T>
struct StripeTile<T, Weight::kInt4> {
    uint4 low, high;           // rows g and g + 8
    uint32_t scale[2];         // of the two rows, each twice
    uint32_t minus_zero[2];    // -(kBase + zero), each twice
    const unsigned char* groups;

    __device__ __forceinline__ void load(const unsigned char* stripe, int lane) {
        low = *reinterpret_cast<const uint4*>(stripe + lane * 16);
        high = *reinterpret_cast<const uint4*>(stripe + 512 + lane * 16);
        groups = stripe + 1024;
    }
    // Scales (and zeros) for the 32 inputs from 32 `part` on; called for 0, 1, 2, 3 in turn.
    __device__ __forceinline__ void select(int part, const TensorArguments& a, int lane) {
        const int shift = a.group_shift;
        if (part & ((1 << shift) - 1)) return;
        const int in_tile = 4 >> shift, index = (lane / 4) * in_tile + (part >> shift);
        const uint32_t both = reinterpret_cast<const uint32_t*>(groups)[index];
        if constexpr (sizeof(T) == 2 && NibbleBits<T>::kBits == 0x58005800) {
            scale[0] = __byte_perm(both, both, 0x1010);
            scale[1] = __byte_perm(both, both, 0x3232);
        } else {
            const float2 f = __half22float2(*reinterpret_cast<const __half2*>(&both));
            asm("cvt.rn.bf16x2.f32 %0, %1, %1;" : "=r"(scale[0]) : "f"(f.x));
            asm("cvt.rn.bf16x2.f32 %0, %1, %1;" : "=r"(scale[1]) : "f"(f.y));
        }
        constexpr uint32_t kNegative = NibbleBits<T>::kBits | 0x80008000;
        if (a.has_zero) {
            const uint32_t zeros = reinterpret_cast<const uint16_t*>(groups + 32 * in_tile)[index];
            minus_zero[0] = kNegative | ((zeros & 0xFF) * 0x00080008);
            minus_zero[1] = kNegative | ((zeros >> 8) * 0x00080008);
        } else {
            minus_zero[0] = minus_zero[1] = kNegative | 0x00400040;  // 8
        }
    }
    template <int Step>
    __device__ __forceinline__ void fragment(uint32_t (&f)[4]) const {
        constexpr int kFirst = Step % 2 * 2;
        f[0] = value<kFirst>(word_of(low, Step / 2), 0);
        f[1] = value<kFirst>(word_of(high, Step / 2), 1);
        f[2] = value<kFirst + 1>(word_of(low, Step / 2), 0);
        f[3] = value<kFirst + 1>(word_of(high, Step / 2), 1);
    }

private:
    template <int I>
    __device__ __forceinline__ uint32_t value(uint32_t word, int row) const {
        const uint32_t turned = I == 0 ? word : __funnelshift_r(word, word, 4 * I);
        const uint32_t raised = and_or<0x00780078, NibbleBits<T>::kBits>(turned);
        return multiply_pairs<T>(add_pairs<T>(raised, minus_zero[row]), scale[row]);
    }
};

template <typename T, Weight kWeight>
struct StripeTile {
    uint4 low, high;  // of 64 of the inputs
    const unsigned char* bytes;

    __device__ __forceinline__ void load(const unsigned char* stripe, int lane) { bytes = stripe + lane * 16; }
    __device__ __forceinline__ void select(int part, const TensorArguments&, int) {
        if (part % 2) return;
        low = *reinterpret_cast<const uint4*>(bytes + part * 512);
        high = *reinterpret_cast<const uint4*>(bytes + part * 512 + 512);
    }
    template <int Step>
    __device__ __forceinline__ void fragment(uint32_t (&f)[4]) const {
        eight_fragment<T, kWeight>(f, word_of(low, Step % 4), word_of(high, Step % 4));
    }
};

// ---- after the sums -----------------------------------------------------------------------------------------------

// What row n's sum is multiplied by.
template <typename T, Weight kWeight>
__device__ __forceinline__ float row_factor(const TensorArguments& a, int n) {
    if constexpr (kWeight == Weight::kInt4) return a.multiplier;
    const float scale = n < a.n ? a.scale[n] * a.multiplier : 0.0f;
    return kWeight == Weight::kFp8 ? scale * kFp8Scale<T> : scale;
}
template <typename T>
__device__ __forceinline__ float row_bias(const TensorArguments& a, int n) {
    return a.bias != nullptr && n < a.n ? float(static_cast<const T*>(a.bias)[n]) : 0.0f;
}
__device__ __forceinline__ float gated(int gate, float x, float up) {
    if (gate == 1) return x / (1.0f + __expf(-x)) * up;
    if (gate == 2) return 0.5f * x * (1.0f + erff(x * 0.70710678118654752f)) * up;
    return 0.5f * x * (1.0f + tanhf(0.79788456080286536f * (x + 0.044715f * x * x * x))) * up;
}
template <typename T>
__device__ __forceinline__ uint32_t pack_pair(float a, float b) {
    uint32_t d;
    if constexpr (NibbleBits<T>::kBits == 0x58005800) {
        asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(b), "f"(a));
    } else {
        asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(b), "f"(a));
    }
    return d;
}
template <typename T>
__device__ __forceinline__ float2 unpack_pair(uint32_t v) {
    if constexpr (NibbleBits<T>::kBits == 0x58005800) return __half22float2(*reinterpret_cast<const __half2*>(&v));
    return make_float2(__uint_as_float(v << 16), __uint_as_float(v & 0xFFFF0000));
}
// Four neighbouring outputs of token m, `v` without the residual, to memory; column n < a.outputs.
template <typename T>
__device__ __forceinline__ void store_four(const TensorArguments& a, int64_t m, int n, float (&v)[4]) {
    T* out = static_cast<T*>(a.out) + m * a.out_stride + n;
    const T* residual = static_cast<const T*>(a.residual);
    if (residual != nullptr) residual += m * a.residual_stride + n;
    if (a.vector && n + 4 <= a.outputs) {
        if (residual != nullptr) {
            const uint2 r = *reinterpret_cast<const uint2*>(residual);
            const float2 first = unpack_pair<T>(r.x), second = unpack_pair<T>(r.y);
            v[0] += first.x, v[1] += first.y, v[2] += second.x, v[3] += second.y;
        }
        *reinterpret_cast<uint2*>(out) = make_uint2(pack_pair<T>(v[0], v[1]), pack_pair<T>(v[2], v[3]));
        return;
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        if (n + i < a.outputs) out[i] = T(v[i] + (residual == nullptr ? 0.0f : float(residual[i])));
    }
}


// Outputs of kRows rows from row0 on and `tokens` tokens from token0 on; sum_of(token, row) gives the sums of four
// neighbouring rows of the tile. Items `first`, `first + step`, ... of four outputs each are done here.
template <typename T, Weight kWeight, int kRows, typename SumOf>
__device__ __forceinline__ void write_tile(const TensorArguments& a, int token0, int row0, int tokens, int first, int step,
                                           const SumOf& sum_of) {
    const auto finished = [&](int token, int row, float (&f)[4]) {
        const float4 sum = sum_of(token, row);
        f[0] = sum.x, f[1] = sum.y, f[2] = sum.z, f[3] = sum.w;
#pragma unroll
        for (int i = 0; i < 4; ++i) f[i] = f[i] * row_factor<T, kWeight>(a, row0 + row + i) + row_bias<T>(a, row0 + row + i);
    };
    const int fours = a.gate ? kRows / 8 : kRows / 4;
    for (int i = first; i < tokens * fours; i += step) {
        const int token = i / fours, four = i % fours;
        float v[4];
        if (a.gate) {
            // rows of a stripe are 8 of the gate, then their 8 of up
            const int row = four / 2 * 16 + four % 2 * 4, column = row0 / 2 + four * 4;
            if (column >= a.outputs) continue;
            float up[4];
            finished(token, row, v);
            finished(token, row + 8, up);
#pragma unroll
            for (int e = 0; e < 4; ++e) v[e] = gated(a.gate, v[e], up[e]);
            store_four<T>(a, token0 + token, column, v);
        } else if (row0 + four * 4 < a.outputs) {
            finished(token, four * 4, v);
            store_four<T>(a, token0 + token, row0 + four * 4, v);
        }
    }
}

}  // namespace trtllm::weight_only
