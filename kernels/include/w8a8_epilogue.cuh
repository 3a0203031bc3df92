// From sums to outputs: scales, bias, residual, rounding. Every step rounds to float32 by itself (no fused
// multiply-add), so that the definition can be repeated anywhere bit by bit.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace trtllm::w8a8 {

__device__ __forceinline__ float as_float(float sum) { return sum; }
__device__ __forceinline__ float as_float(int32_t sum) { return __int2float_rn(sum); }

// Two neighbouring 16-bit values, packed; `half` says float16, else bfloat16.
__device__ __forceinline__ uint32_t pack(float low, float high, bool half) {
    if (half) {
        const __half2 v = __floats2half2_rn(low, high);
        return reinterpret_cast<const uint32_t&>(v);
    }
    const __nv_bfloat162 v = __floats2bfloat162_rn(low, high);
    return reinterpret_cast<const uint32_t&>(v);
}
__device__ __forceinline__ float unpack(uint16_t bits, bool half) {
    return half ? __half2float(__ushort_as_half(bits)) : __uint_as_float(uint32_t(bits) << 16);
}
__device__ __forceinline__ float load_16bit(const void* from, int64_t i, bool half) {
    return unpack(static_cast<const uint16_t*>(from)[i], half);
}

template <typename Sum>
__device__ __forceinline__ float scaled(Sum sum, float a_scale, float w_scale) {
    return __fmul_rn(__fmul_rn(as_float(sum), a_scale), w_scale);
}

}  // namespace trtllm::w8a8
