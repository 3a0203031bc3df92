// What a logit weighs, as a whole number: every step is a float32 operation that a CPU repeats to the bit, and sums of
// whole numbers do not depend on their order.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace trtllm::sampling {

constexpr int kWeightBits = 40;  // of the largest logit's weight; 2^24 tokens can be added up

// A whole number that grows with the float (not NaN). Zeros must be positive.
__device__ __forceinline__ uint32_t key_of(float x) {
    const uint32_t bits = __float_as_uint(x);
    return bits ^ (bits >> 31 ? ~0u : 0x80000000u);
}
__device__ __forceinline__ float of_key(uint32_t key) {
    return __uint_as_float(key ^ (key >> 31 ? 0x80000000u : ~0u));
}
constexpr uint32_t kLeastKey = 0x00800000u;  // of the least finite float

struct Weights {
    float largest, factor;  // log2(e) / temperature

    __device__ __forceinline__ Weights(float max, float temperature) {
        largest = max;
        factor = fminf(__fdiv_rn(1.4426950408889634f, temperature), 3e38f);
    }

    // floor(2^40 * 2^y) with y = (x - largest) * factor: Taylor's polynomial on half a unit around a whole number is
    // within 1.3e-7 of 2^y.
    __device__ __forceinline__ uint64_t operator()(float x) const {
        // everything below weighs nothing, as 2^-41 does
        const float y = fmaxf(__fmul_rn(__fsub_rn(x, largest), factor), -float(kWeightBits + 1));
        const float rounding = __fadd_rn(y, 12582912.0f);  // the nearest whole number in the low bits of the mantissa
        const float f = __fsub_rn(y, __fsub_rn(rounding, 12582912.0f));
        float p = 1.5403530393381609e-4f;
        p = __fmaf_rn(p, f, 1.3333558146428443e-3f);
        p = __fmaf_rn(p, f, 9.6181291076284772e-3f);
        p = __fmaf_rn(p, f, 5.5504108664821580e-2f);
        p = __fmaf_rn(p, f, 2.4022650695910071e-1f);
        p = __fmaf_rn(p, f, 6.9314718055994531e-1f);
        p = __fmaf_rn(p, f, 1.0f);
        const uint32_t power = __float_as_uint(p) + (__float_as_uint(rounding) << 23);  // 2^y as a float
        uint32_t digits;  // (power & 0x7fffff) | 0x800000, which the compiler would make of two instructions
        asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(digits) : "r"(power), "r"(0x7fffffu), "r"(0x800000u));
        return (uint64_t(digits) << (kWeightBits - 23)) >> (127 - (power >> 23));
    }
};

// The first two of the four words of Philox4x32-10, low word first.
__device__ __forceinline__ uint64_t philox(uint64_t key, uint32_t step, uint32_t draw) {
    uint32_t c0 = step, c1 = draw, c2 = 0, c3 = 0;
    uint32_t k0 = uint32_t(key), k1 = uint32_t(key >> 32);
#pragma unroll
    for (int round = 0; round < 10; ++round) {
        const uint32_t high0 = __umulhi(0xD2511F53u, c0), low0 = 0xD2511F53u * c0;
        const uint32_t high1 = __umulhi(0xCD9E8D57u, c2), low1 = 0xCD9E8D57u * c2;
        c0 = high1 ^ c1 ^ k0;
        c1 = low1;
        c2 = high0 ^ c3 ^ k1;
        c3 = low0;
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    return uint64_t(c1) << 32 | c0;
}

}  // namespace trtllm::sampling
