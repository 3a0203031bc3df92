// The shape of every kernel that needs a whole row before it can write: blockDim.x threads (a whole number of warps)
// hold a row in registers, N vectors of V elements each; blockDim.y rows a block where one warp is enough for a row.
#pragma once

#include "launch.hpp"
#include "vectors.cuh"

namespace trtllm::pointwise {

struct RowShape {
    int vectors;  // a thread; 0: the row does not fit into registers
    dim3 grid, block;
};

/// For rows of `count` vectors; no more than `widest` threads of four vectors. One token wants as many threads as
/// vectors, many want several vectors a thread, so that more bytes are in flight for each wait at a barrier: as many as
/// leave `few` threads a row.
inline RowShape row_shape(int64_t tokens, int64_t count, int widest = 1024, int few = 256) {
    RowShape shape = {};
    int threads;
    if (count <= 128) {
        threads = 32;
        shape.vectors = count <= 32 ? 1 : count <= 64 ? 2 : 4;
    } else {
        const int64_t most = tokens > 2 * multiprocessors() ? few : 1024;
        shape.vectors = count <= most ? 1 : count <= 2 * most ? 2 : count <= 4 * widest ? 4 : 0;
        threads = shape.vectors == 0 ? 1024 : int((count + 32 * shape.vectors - 1) / (32 * shape.vectors)) * 32;
    }
    shape.block = dim3(unsigned(threads), threads == 32 ? 4 : 1);
    shape.grid = dim3(unsigned((tokens + shape.block.y - 1) / shape.block.y));
    return shape;
}

// Write the row: as it is, or divided by the static scale, or by the scale of the row found here. `value(n, y)` fills y with
// the thread's n-th vector; it is asked for once more where the scale is found first, which costs fewer registers than to
// keep the row in float32.
template <typename T, int V, int N, typename Value>
__device__ __forceinline__ void write_row(const Value& value, int64_t row, int width, void* out, int64_t stride,
                                          int32_t out_dtype, const float* static_scale, float* token_scales,
                                          float* shared) {
    const bool int8 = out_dtype == TRTLLM_INT8;
    float scale = 1.0f;
    if (token_scales != nullptr) {
        float largest = 0.0f;
#pragma unroll
        for (int n = 0; n < N; ++n) {
            if (int(threadIdx.x + n * blockDim.x) * V >= width) continue;
            float y[V];
            value(n, y);
#pragma unroll
            for (int i = 0; i < V; ++i) largest = fmaxf(largest, fabsf(y[i]));
        }
        scale = token_scale(over_row<Largest>(largest, shared), int8);
        if (threadIdx.x == 0) token_scales[row] = scale;
    } else if (static_scale != nullptr) {
        scale = *static_scale;
    }
    const bool quantized = out_dtype == TRTLLM_INT8 || out_dtype == TRTLLM_FLOAT8_E4M3;
    const Divisor divided(scale);
#pragma unroll
    for (int n = 0; n < N; ++n) {
        const int at = int(threadIdx.x + n * blockDim.x) * V;
        if (at >= width) continue;
        float y[V];
        value(n, y);
        if (!quantized) {
            store<T, V>(static_cast<T*>(out) + row * stride + at, y);
        } else {
#pragma unroll
            for (int i = 0; i < V; ++i) y[i] = divided(y[i]);
            store_8bit(static_cast<uint8_t*>(out) + row * stride + at, y, int8);
        }
    }
}

// The same for values that are computed anew: `value(i)` of element i.
template <typename T, typename Value>
__device__ __forceinline__ void write_long_row(const Value& value, int64_t row, int64_t width, void* out, int64_t stride,
                                               int32_t out_dtype, const float* static_scale, float* token_scales,
                                               float* shared) {
    const bool int8 = out_dtype == TRTLLM_INT8;
    float scale = 1.0f;
    if (token_scales != nullptr) {
        float largest = 0.0f;
        for (int64_t i = threadIdx.x; i < width; i += blockDim.x) largest = fmaxf(largest, fabsf(value(i)));
        scale = token_scale(over_row<Largest>(largest, shared), int8);
        if (threadIdx.x == 0) token_scales[row] = scale;
    } else if (static_scale != nullptr) {
        scale = *static_scale;
    }
    const bool quantized = out_dtype == TRTLLM_INT8 || out_dtype == TRTLLM_FLOAT8_E4M3;
    const Divisor divided(scale);
    for (int64_t i = threadIdx.x; i < width; i += blockDim.x) {
        if (quantized) {
            const float q[1] = {divided(value(i))};
            store_8bit(static_cast<uint8_t*>(out) + row * stride + i, q, int8);
        } else {
            static_cast<T*>(out)[row * stride + i] = T(value(i));
        }
    }
}

}  // namespace trtllm::pointwise
