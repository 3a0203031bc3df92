// Packed weights to pairs of float16 or bfloat16, the first operand of the matrix instructions.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace trtllm::weight_only {

template <typename T>
__device__ __forceinline__ uint32_t subtract_pairs(uint32_t a, uint32_t b);
template <>
__device__ __forceinline__ uint32_t subtract_pairs<__half>(uint32_t a, uint32_t b) {
    uint32_t d;
    asm("sub.rn.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
    return d;
}
template <>
__device__ __forceinline__ uint32_t subtract_pairs<__nv_bfloat16>(uint32_t a, uint32_t b) {
    // a - 1 * b: bfloat16 has the fused form from sm_80 on, plain subtraction only later
    uint32_t d;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(b), "r"(0xBF80BF80u), "r"(a));
    return d;
}

// (word & mask) | bits, one instruction (truth table of LOP3: a & b | c = 0xEA).
template <uint32_t Mask, uint32_t Bits>
__device__ __forceinline__ uint32_t and_or(uint32_t word) {
    uint32_t d;
    asm("lop3.b32 %0, %1, %2, %3, 0xEA;" : "=r"(d) : "r"(word), "n"(Mask), "n"(Bits));
    return d;
}

// (~word & mask) | bits.
template <uint32_t Mask, uint32_t Bits>
__device__ __forceinline__ uint32_t and_not_or(uint32_t word) {
    uint32_t d;
    asm("lop3.b32 %0, %1, %2, %3, 0xAE;" : "=r"(d) : "r"(word), "n"(Mask), "n"(Bits));
    return d;
}

// What int4 pairs come out as: (kOffset + value) / kScale, so that value = kScale * pair - kOffset.
template <typename T>
struct Int4Pair;
template <>
struct Int4Pair<__nv_bfloat16> {
    static constexpr float kOffset = 16.0f;
    static constexpr float kScale = 1.0f;
    // the nibble in mantissa bits 3..6 under the exponent of 16
    static __device__ __forceinline__ uint32_t from(uint32_t turned) { return and_or<0x00780078, 0x41804180>(turned); }
};
template <>
struct Int4Pair<__half> {
    static constexpr float kOffset = 0.0f;
    static constexpr float kScale = 2097152.0f;  // 2^21: float16 subnormals, which the matrix units multiply exactly
    static __device__ __forceinline__ uint32_t from(uint32_t turned) { return turned & 0x00780078; }
};

// Pair i (0..3) of an int4 word: values v[i] and v[i + 4].
template <typename T, int I>
__device__ __forceinline__ uint32_t int4_pair(uint32_t word) {
    return Int4Pair<T>::from(I == 0 ? word : __funnelshift_r(word, word, 4 * I));
}

// Bytes 0 and 2 (I = 0) or 1 and 3 (I = 1) of an int8 word, 128 higher than the weights: the weights.
template <typename T, int I>
__device__ __forceinline__ uint32_t int8_pair(uint32_t word);
template <>
__device__ __forceinline__ uint32_t int8_pair<__half, 0>(uint32_t word) {
    return subtract_pairs<__half>(__byte_perm(word, 0x64646464, 0x4240), 0x64806480);  // 1024 + code - 1152
}
template <>
__device__ __forceinline__ uint32_t int8_pair<__half, 1>(uint32_t word) {
    return subtract_pairs<__half>(__byte_perm(word, 0x64646464, 0x4341), 0x64806480);
}
// bfloat16 has seven bits of mantissa: 128 + (code % 128), less 128 or 256 by the code's highest bit.
template <>
__device__ __forceinline__ uint32_t int8_pair<__nv_bfloat16, 0>(uint32_t word) {
    return subtract_pairs<__nv_bfloat16>(and_or<0x007F007F, 0x43004300>(word),
                                         and_not_or<0x00800080, 0x43004300>(word));
}
template <>
__device__ __forceinline__ uint32_t int8_pair<__nv_bfloat16, 1>(uint32_t word) {
    return int8_pair<__nv_bfloat16, 0>(word >> 8);
}

// The same of an E4M3 word. float16 comes out 2^8 too small (subnormals included), bfloat16 exact.
template <typename T>
constexpr float kFp8Scale = 1.0f;
template <>
constexpr float kFp8Scale<__half> = 256.0f;
template <typename T, int I>
__device__ __forceinline__ uint32_t fp8_pair(uint32_t word) {
    const uint32_t high = I == 0 ? word << 8 : word;
    if constexpr (sizeof(T) == 2 && kFp8Scale<T> != 1.0f) {
        return (high & 0x80008000) | ((high >> 1) & 0x3F803F80);
    } else {
        const uint32_t small = (high & 0x80008000) | ((high >> 4) & 0x07F007F0);
        uint32_t d;
        // times 2^120 brings the exponent's bias from 7 to 127
        asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(small), "r"(0x7B807B80u), "r"(0x80008000u));
        return d;
    }
}

}  // namespace trtllm::weight_only
