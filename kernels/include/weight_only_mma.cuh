// The portable kernel of weight-only products for more than a few tokens (mma.sync, sm_80 on): tiles of 128 rows of weights
// x 64 tokens, four warps of 32 rows each, stages of 128 inputs copied ahead by cp.async.
#pragma once

#include "weight_only_tensor_launch.hpp"
#include "weight_only_tile.cuh"

namespace trtllm::weight_only {

struct PortableShape {
    static constexpr int kRows = 128, kTokens = 64, kThreads = 128, kSlots = 3;
    static constexpr int kPitch = kRows + 4;  // of the sums in shared memory, in floats
    static constexpr int kTokenBytes = kTokens * kStageDepth * 2;
    static constexpr int slot_bytes(int stripe_bytes) { return kTokenBytes + 8 * stripe_bytes; }
    // 96 KiB at most: GPUs of compute capability 8.6 and 8.9 give a block 99
    static constexpr int shared_bytes(int stripe_bytes) { return kSlots * slot_bytes(stripe_bytes); }
};

template <typename T, Weight kWeight>
__global__ void __launch_bounds__(PortableShape::kThreads)
    portable_kernel(const T* x, int64_t x_stride, const unsigned char* weight, int64_t weight_row_bytes, int stripes,
                    const __grid_constant__ TensorArguments a) {
    using Shape = PortableShape;
    extern __shared__ __align__(128) unsigned char ring[];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int token0 = int(blockIdx.x) * Shape::kTokens, row0 = int(blockIdx.y) * Shape::kRows;
    const int slot_bytes = Shape::slot_bytes(a.stripe_bytes);
    if (a.pdl) ptx::wait_for_previous_kernel();

    const auto copy = [&](int stage) {
        if (stage < a.stages) {
            unsigned char* slot = ring + stage % Shape::kSlots * slot_bytes;
            // 16 pieces of 8 inputs a token; piece ^ (token % 8) keeps ldmatrix free of conflicts
#pragma unroll
            for (int i = 0; i < Shape::kTokens * 16 / Shape::kThreads; ++i) {
                const int at = i * Shape::kThreads + int(threadIdx.x), token = at / 16, piece = at % 16;
                const int k = stage * kStageDepth + piece * 8;
                const bool inside = token0 + token < a.m && k < a.k;
                const T* from = inside ? x + (token0 + token) * x_stride + k : x;
                ptx::copy_async_16(slot + token * 256 + ((piece ^ (token & 7)) * 16), from,
                                   inside ? uint32_t(min(8, a.k - k)) * 2 : 0u);
            }
            const int pieces = a.stripe_bytes / 16;
            for (int i = int(threadIdx.x); i < 8 * pieces; i += Shape::kThreads) {
                const int stripe = i / pieces, piece = i % pieces;
                const int64_t at = int64_t(stage) * a.stripe_bytes + piece * 16;
                const bool inside = row0 / 16 + stripe < stripes && at < weight_row_bytes;
                ptx::copy_async_16(slot + Shape::kTokenBytes + i * 16,
                                   inside ? weight + (row0 / 16 + stripe) * weight_row_bytes + at : weight, inside ? 16u : 0u);
            }
        }
        ptx::copy_async_commit();
    };

    float sums[2][8][4] = {};
    for (int i = 0; i < Shape::kSlots - 1; ++i) copy(i);
    for (int stage = 0; stage < a.stages; ++stage) {
        ptx::copy_async_wait<Shape::kSlots - 2>();
        __syncthreads();
        copy(stage + Shape::kSlots - 1);
        const unsigned char* slot = ring + stage % Shape::kSlots * slot_bytes;
        StripeTile<T, kWeight> tile[2];
#pragma unroll
        for (int s = 0; s < 2; ++s) tile[s].load(slot + Shape::kTokenBytes + (2 * warp + s) * a.stripe_bytes, lane);
        const auto step = [&](auto which) {
            constexpr int kStep = decltype(which)::value;
            uint32_t f[2][4];
#pragma unroll
            for (int s = 0; s < 2; ++s) {
                if constexpr (kStep % 2 == 0) tile[s].select(kStep / 2, a, lane);
                tile[s].template fragment<kStep>(f[s]);
            }
#pragma unroll
            for (int j = 0; j < 8; j += 2) {
                // matrices: tokens 8 j.., inputs 0..7 and 8..15; then tokens 8 (j + 1)..
                const int token = 8 * (j + lane / 16) + lane % 8, piece = 2 * kStep + lane / 8 % 2;
                uint32_t b[4];
                ptx::ldmatrix_x4(b, slot + token * 256 + ((piece ^ (token & 7)) * 16));
#pragma unroll
                for (int s = 0; s < 2; ++s) {
                    ptx::mma_16816<T>(sums[s][j], f[s], b[0], b[1]);
                    ptx::mma_16816<T>(sums[s][j + 1], f[s], b[2], b[3]);
                }
            }
        };
        unroll<8>(step);
    }
    ptx::copy_async_wait<0>();
    __syncthreads();
    float* written = reinterpret_cast<float*>(ring);
#pragma unroll
    for (int s = 0; s < 2; ++s) {
#pragma unroll
        for (int j = 0; j < 8; ++j) {
            float* at = written + (8 * j + lane % 4 * 2) * Shape::kPitch + (2 * warp + s) * 16 + lane / 4;
            at[0] = sums[s][j][0];
            at[Shape::kPitch] = sums[s][j][1];
            at[8] = sums[s][j][2];
            at[Shape::kPitch + 8] = sums[s][j][3];
        }
    }
    __syncthreads();
    write_tile<T, kWeight, Shape::kRows>(a, token0, row0, min(Shape::kTokens, a.m - token0), int(threadIdx.x), Shape::kThreads,
                                         [&](int token, int row) {
                                             return *reinterpret_cast<const float4*>(written + token * Shape::kPitch + row);
                                         });
}

template <typename T, Weight kWeight>
cudaError_t launch_portable(const TensorArguments& a, const void* x, int64_t x_stride, const void* weight,
                            int64_t weight_row_bytes, int stripes, cudaStream_t stream) {
    using Shape = PortableShape;
    static unsigned long long done_devices = 0;
    const cudaError_t code = allow_shared(reinterpret_cast<const void*>(portable_kernel<T, kWeight>), 96 * 1024, done_devices);
    if (code != cudaSuccess) return code;
    const dim3 grid(unsigned((a.m + Shape::kTokens - 1) / Shape::kTokens), unsigned((a.n + Shape::kRows - 1) / Shape::kRows));
    portable_kernel<T, kWeight><<<grid, Shape::kThreads, Shape::shared_bytes(a.stripe_bytes), stream>>>(
        static_cast<const T*>(x), x_stride, static_cast<const unsigned char*>(weight), weight_row_bytes, stripes, a);
    return cudaGetLastError();
}

}  // namespace trtllm::weight_only
