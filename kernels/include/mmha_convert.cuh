// What a cache's element type means to generation attention: how four 8-bit values become operands of the matrix unit,
// and how a new value is rounded into the cache.
#pragma once

#include <cuda_fp8.h>

#include <type_traits>

#include "ptx.cuh"

namespace trtllm::mmha {

// Quotients rounded as a division rounds them, by one reciprocal for all of them (Markstein 1990: a quotient from a
// reciprocal rounded to nearest, corrected once by its remainder). Beyond what any 8-bit type holds the correction, whose
// remainder may overflow, is left out.
struct Divisor {
    float by = 1.0f, inverse = 1.0f;
    bool plain = true;  // far from where reciprocals and remainders lose digits
    Divisor() = default;
    __device__ __forceinline__ explicit Divisor(float divisor)
        : by(divisor), inverse(1.0f / divisor), plain(divisor > 1e-18f && divisor < 1e18f) {}
    __device__ __forceinline__ float of(float x) const {
        if (!plain) return x / by;
        const float near = x * inverse;
        const float size = fabsf(near);  // minus 0 stays as it is, which a correction by 0 would not let it
        return size > 0.0f && size < 65536.0f ? fmaf(fmaf(-near, by, x), inverse, near) : near;
    }
};

// `Math` is what the matrix unit multiplies. `kFactor` is what expanded values must be multiplied by.
template <typename C>
struct Cached;

template <>
struct Cached<__half> {
    using Math = __half;
    static constexpr int kBytes = 2;
    static constexpr float kFactor = 1.0f;
};

template <>
struct Cached<__nv_bfloat16> {
    using Math = __nv_bfloat16;
    static constexpr int kBytes = 2;
    static constexpr float kFactor = 1.0f;
};

// int8 as float16, which holds it exactly: byte b + 128 under the exponent of 1024 is 1024 + 128 + b.
template <>
struct Cached<int8_t> {
    using Math = __half;
    static constexpr int kBytes = 1;
    static constexpr float kFactor = 1.0f;

    // bytes 0 and 2 of `four`, and bytes 1 and 3
    static __device__ __forceinline__ void expand(uint32_t four, uint32_t& even, uint32_t& odd) {
        const uint32_t shifted = four ^ 0x80808080u;
        const uint32_t bias = 0x64806480u;  // 1152
        uint32_t low = __byte_perm(shifted, 0x64646464u, 0x4240), high = __byte_perm(shifted, 0x64646464u, 0x4341);
        asm("sub.f16x2 %0, %1, %2;" : "=r"(even) : "r"(low), "r"(bias));
        asm("sub.f16x2 %0, %1, %2;" : "=r"(odd) : "r"(high), "r"(bias));
    }
    static __device__ __forceinline__ uint16_t round_two(float a, float b, const Divisor& scale) {
        const int low = int(fminf(fmaxf(rintf(scale.of(a)), -127.0f), 127.0f));
        const int high = int(fminf(fmaxf(rintf(scale.of(b)), -127.0f), 127.0f));
        return uint16_t((low & 0xff) | (high & 0xff) << 8);
    }
};

// E4M3 as float16: exponent and mantissa moved to where float16 has them give the value / 256, subnormals included (the
// exponents' biases are 7 and 15), and the matrix unit takes float16 subnormals as they are.
template <>
struct Cached<__nv_fp8_e4m3> {
    using Math = __half;
    static constexpr int kBytes = 1;
    static constexpr float kFactor = 256.0f;

    static __device__ __forceinline__ void expand(uint32_t four, uint32_t& even, uint32_t& odd) {
        even = ((four << 8) & 0x80008000u) | ((four << 7) & 0x3f803f80u);
        odd = (four & 0x80008000u) | ((four >> 1) & 0x3f803f80u);
    }
    static __device__ __forceinline__ uint16_t round_two(float a, float b, const Divisor& scale) {
        const float2 both = make_float2(scale.of(a), scale.of(b));
        return __nv_cvt_float2_to_fp8x2(both, __NV_SATFINITE, __NV_E4M3);
    }
};

template <typename T>
__device__ __forceinline__ uint32_t pack(float low, float high) {
    if constexpr (std::is_same_v<T, __half>) {
        const __half2 both = __floats2half2_rn(low, high);
        return reinterpret_cast<const uint32_t&>(both);
    } else {
        const __nv_bfloat162 both = __floats2bfloat162_rn(low, high);
        return reinterpret_cast<const uint32_t&>(both);
    }
}

// Two values of q's type, which only the launcher knows where the cache has 8 bits.
__device__ __forceinline__ float2 widen(uint32_t two, bool bfloat16) {
    if (bfloat16) return make_float2(__uint_as_float(two << 16), __uint_as_float(two & 0xffff0000u));
    return __half22float2(reinterpret_cast<const __half2&>(two));
}
__device__ __forceinline__ uint32_t narrow(float low, float high, bool bfloat16) {
    return bfloat16 ? pack<__nv_bfloat16>(low, high) : pack<__half>(low, high);
}

// An 8x8 matrix of 16-bit elements transposed across the warp: a fragment of sums becomes one of operands.
__device__ __forceinline__ uint32_t transpose_8x8(uint32_t x) {
    uint32_t y;
    asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
    return y;
}

// As in ptx.cuh, by addresses in shared memory: offsets are then 32-bit sums, and constants part of the instruction.
__device__ __forceinline__ void ldmatrix(uint32_t (&r)[4], uint32_t row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(row)
                 : "memory");
}
__device__ __forceinline__ void ldmatrix_trans(uint32_t (&r)[4], uint32_t row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(row)
                 : "memory");
}
// `bytes` 16, or 0 for zeros
__device__ __forceinline__ void copy_async(uint32_t to, const void* from, uint32_t bytes) {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
}
__device__ __forceinline__ void copy_async(uint32_t to, const void* from) {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
}

__device__ __forceinline__ float exp2_approx(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// by one exponential and one division: tanh.approx errs by 5e-4, which a cap of 50 makes 0.025 in an exponent
__device__ __forceinline__ float tanh_fast(float x) {
    return 1.0f - __fdividef(2.0f, 1.0f + exp2_approx(fminf(x * 2.885390081777927f, 126.0f)));
}

}  // namespace trtllm::mmha
