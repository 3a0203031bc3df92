// From sums to outputs: scale, bias, gate, residual.
#pragma once

#include "weight_only_products.cuh"

namespace trtllm::weight_only {

// What one output takes from global memory besides its sum: asked for before the products, used after them.
struct Extra {
    float factor;
    uint16_t bias, residual;  // bits of T
};

// The parameters, for row `row` of 16 of a stripe: nothing that a kernel before wrote.
template <typename T, Kind K>
__device__ __forceinline__ void load_parameters(Extra& extra, const trtllm_weight_only_gemm_params& p, int stripe,
                                                int row, bool valid) {
    extra.factor = p.weight_multiplier, extra.bias = 0;
    const int64_t n = int64_t(stripe) * kStripeRows + row;
    if (!valid || n >= p.n) return;
    if constexpr (K == Kind::kInt8 || K == Kind::kFp8) extra.factor *= static_cast<const float*>(p.scale)[n];
    if (p.bias != nullptr) extra.bias = static_cast<const uint16_t*>(p.bias)[n];
}

template <typename T>
__device__ __forceinline__ void load_residual(Extra& extra, const trtllm_weight_only_gemm_params& p, int stripe,
                                              int token, int row, bool valid) {
    extra.residual = 0;
    const int64_t n = int64_t(stripe) * kStripeRows + row;
    if (p.residual != nullptr && valid && n < p.n && (p.gate == 0 || row < 8)) {
        const int64_t column = p.gate == 0 ? n : int64_t(stripe) * 8 + row;
        extra.residual = static_cast<const uint16_t*>(p.residual)[token * p.residual_stride + column];
    }
}

// One sum to one output. A half warp holds the 16 rows of a stripe for one token (all lanes must call).
template <typename T, Kind K>
__device__ __forceinline__ void finish(const trtllm_weight_only_gemm_params& p, float v, const Extra& extra, int stripe,
                                       int token, int row, bool valid) {
    const int64_t n = int64_t(stripe) * kStripeRows + row;
    int64_t column = n;
    valid = valid && n < p.n;
    constexpr bool kRows = K == Kind::kInt8 || K == Kind::kFp8;  // have scales of their own
    const float2 added = to_floats<T>(extra.bias | uint32_t(extra.residual) << 16);
    v = K == Kind::kDense ? v + added.x : fmaf(v, kRows ? extra.factor : p.weight_multiplier, added.x);
    if (p.gate != 0) {
        const float up = __shfl_down_sync(0xFFFFFFFFu, v, 8);
        v = activate(v, p.gate) * up;
        column = int64_t(stripe) * 8 + row;
        valid = valid && row < 8;
    }
    if (valid) static_cast<T*>(p.out)[token * p.out_stride + column] = T(v + added.y);
}

}  // namespace trtllm::weight_only
