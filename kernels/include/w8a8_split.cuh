// The 8-bit product for few activation rows, on Hopper: bound by reading the weights once.
//
// The weights take the matrix unit's operand of 64 rows and the activations its narrow one (8 to 128 columns), so that
// one token wastes nothing but idle arithmetic. One warp streams both operands through a deep ring of shared-memory
// stages with the copy engine; each warpgroup multiplies 64 weight rows. The K axis is split over the blocks of a
// cluster, which add their partial sums through distributed shared memory in rank order: no workspace, the same bits
// every time.
#pragma once

#include "registry.hpp"
#include "w8a8_epilogue.cuh"
#include "w8a8_launch.hpp"
#include "w8a8_sm90.cuh"

namespace trtllm::w8a8 {

template <typename TypeT, int RowsT, int ColsT, int StagesT>
struct SplitTile {
    using Type = TypeT;
    static constexpr int kRows = RowsT, kCols = ColsT, kStages = StagesT;
    static constexpr int kConsumers = 2 * kRows;  // threads: a warpgroup for every 64 rows
    static constexpr int kWeightBytes = kRows * 128, kStageBytes = kWeightBytes + kCols * 128;
    static constexpr int kSumStride = kRows + 4;  // keeps the columns of a quad on different banks
    static constexpr int kShared = kStages * kStageBytes + 2 * kStages * 8;
    static_assert(kCols * kSumStride * 4 <= kStages * kStageBytes, "sums reuse the stages");
};

template <typename Tile>
__global__ void __launch_bounds__(Tile::kConsumers + 32)
    split_kernel(const __grid_constant__ CUtensorMap w_map, const __grid_constant__ CUtensorMap a_map,
                 const trtllm_w8a8_params p, int split) {
#ifdef TRTLLM_SM90A
    using Sum = typename Tile::Type::Sum;
    constexpr int kRows = Tile::kRows, kCols = Tile::kCols, kStages = Tile::kStages;
    extern __shared__ __align__(1024) uint8_t shared[];
    uint64_t* full = reinterpret_cast<uint64_t*>(shared + kStages * Tile::kStageBytes);
    uint64_t* empty = full + kStages;

    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int rank = int(blockIdx.x) % split;
    const int n0 = int(blockIdx.x) / split * kRows, m0 = int(blockIdx.y) * kCols;
    const int blocks = int((p.k + 127) / 128);
    const int begin = int(int64_t(blocks) * rank / split), count = int(int64_t(blocks) * (rank + 1) / split) - begin;

    if (threadIdx.x == 0) {
        for (int s = 0; s < kStages; ++s) {
            ptx::barrier_init(full + s, 1);
            ptx::barrier_init(empty + s, Tile::kConsumers / 32);
        }
        ptx::barrier_init_fence();
    }
    __syncthreads();
    ptx::let_next_kernel_start();

    if (warp == Tile::kConsumers / 32) {
        if (lane == 0) {
            const auto weights = [&](int i) {
                uint8_t* stage = shared + i % kStages * Tile::kStageBytes;
                ptx::barrier_expect(full + i % kStages, Tile::kStageBytes);
                copy_box(stage, w_map, (begin + i) * 128, n0, full + i % kStages, kEvictFirst);
            };
            const auto activations = [&](int i) {
                uint8_t* stage = shared + i % kStages * Tile::kStageBytes + Tile::kWeightBytes;
                copy_box(stage, a_map, (begin + i) * 128, m0, full + i % kStages, kEvictLast);
            };
            // the weights do not depend on the kernel before this one
            const int ahead = min(count, kStages);
            for (int i = 0; i < ahead; ++i) weights(i);
            ptx::wait_for_previous_kernel();
            for (int i = 0; i < ahead; ++i) activations(i);
            for (int i = ahead; i < count; ++i) {
                wait(empty + i % kStages, (i / kStages - 1) & 1);
                weights(i);
                activations(i);
            }
        }
        if (split > 1) {
            __syncwarp();
            cluster_arrive_relaxed();
            cluster_wait();
        }
    } else {
        const int group = warp / 4;
        Sum part[kCols / 2];
        float total[kCols / 2];  // of fp8: the matrix unit keeps too few bits to sum all of K
#pragma unroll
        for (int i = 0; i < kCols / 2; ++i) {
            part[i] = 0;
            total[i] = 0;
        }
        for (int i = 0; i < count; ++i) {
            const int s = i % kStages;
            wait(full + s, (i / kStages) & 1);
            const uint8_t* stage = shared + s * Tile::kStageBytes;
            const uint64_t w = descriptor(stage + group * 64 * 128), a = descriptor(stage + Tile::kWeightBytes);
            pin(part);
            wgmma_fence();
#pragma unroll
            for (int step = 0; step < 4; ++step) {
                Wgmma<typename Tile::Type, kCols>::run(part, w + 2 * step, a + 2 * step,
                                                       std::is_same_v<Sum, int32_t> ? i + step : step);
            }
            wgmma_commit();
            wgmma_wait<0>();
            pin(part);
            if (lane == 0) ptx::barrier_arrive(empty + s);
            if constexpr (std::is_same_v<Sum, float>) {
#pragma unroll
                for (int j = 0; j < kCols / 2; ++j) total[j] += part[j];
            }
        }
        // every stage has been read: their memory takes the sums, [column][row]
        ptx::named_barrier_sync<Tile::kConsumers>(1);
        Sum* sums = reinterpret_cast<Sum*>(shared);
        const int row = group * 64 + warp % 4 * 16 + lane / 4, column = lane % 4 * 2;
#pragma unroll
        for (int j = 0; j < kCols / 8; ++j) {
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                Sum* at = sums + (j * 8 + column + e % 2) * Tile::kSumStride + row + e / 2 * 8;
                if constexpr (std::is_same_v<Sum, float>) {
                    *at = total[j * 4 + e];
                } else {
                    *at = part[j * 4 + e];
                }
            }
        }
        if (split > 1) {
            cluster_arrive();
            cluster_wait();
        } else {
            ptx::named_barrier_sync<Tile::kConsumers>(1);
        }
        ptx::wait_for_previous_kernel();

        // each block finishes its share of the rows, four of them a thread
        const int share = kRows / split, vectors = share / 4;
        const int columns = int(min(int64_t(kCols), p.m - m0));
        const bool half = p.out_dtype == TRTLLM_FLOAT16;
        const bool wide = (p.out_stride % 4 == 0) && (reinterpret_cast<uintptr_t>(p.out) % 8 == 0);
        for (int i = threadIdx.x; i < vectors * columns; i += Tile::kConsumers) {
            const int c = i / vectors, r = rank * share + i % vectors * 4;
            const uint32_t local = ptx::shared_address(sums + c * Tile::kSumStride + r);
            Sum sum[4] = {0, 0, 0, 0};
            for (int q = 0; q < split; ++q) {
                const uint4 v = load_cluster_16(address_in(local, q));
                if constexpr (std::is_same_v<Sum, float>) {
                    sum[0] += __uint_as_float(v.x), sum[1] += __uint_as_float(v.y);
                    sum[2] += __uint_as_float(v.z), sum[3] += __uint_as_float(v.w);
                } else {
                    sum[0] += int(v.x), sum[1] += int(v.y), sum[2] += int(v.z), sum[3] += int(v.w);
                }
            }
            const int64_t m = m0 + c, n = n0 + r;
            const float a_scale = p.a_scale[p.a_scale_per_token ? m : 0];
            float value[4];
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                if (n + e >= p.n) break;
                value[e] = scaled(sum[e], a_scale, p.w_scale[p.w_scale_per_channel ? n + e : 0]);
                if (p.bias) value[e] = __fadd_rn(value[e], load_16bit(p.bias, n + e, half));
                if (p.residual)
                    value[e] = __fadd_rn(value[e], load_16bit(p.residual, m * p.residual_stride + n + e, half));
            }
            uint16_t* out = static_cast<uint16_t*>(p.out) + m * p.out_stride + n;
            if (wide && n + 4 <= p.n) {
                *reinterpret_cast<uint2*>(out) =
                    make_uint2(pack(value[0], value[1], half), pack(value[2], value[3], half));
            } else {
#pragma unroll
                for (int e = 0; e < 4; ++e) {
                    if (n + e < p.n) out[e] = uint16_t(pack(value[e], 0.0f, half));
                }
            }
        }
    }
    // a block stays while others may still read its sums
    if (split > 1) {
        __syncwarp();
        cluster_arrive_relaxed();
        cluster_wait();
    }
#endif
}

template <typename Tile>
cudaError_t launch_split(const trtllm_w8a8_params& p, int split, cudaStream_t stream) {
    static unsigned long long allowed = 0;
    cudaError_t code = allow_shared(reinterpret_cast<const void*>(split_kernel<Tile>), Tile::kShared, allowed);
    if (code != cudaSuccess) return code;
    CUtensorMap w_map, a_map;
    code = tensor_map(&w_map, p.w, 1, p.n, p.k, p.w_stride, Tile::kRows, 128);
    if (code != cudaSuccess) return code;
    code = tensor_map(&a_map, p.a, 1, p.m, p.k, p.a_stride, Tile::kCols, 128);
    if (code != cudaSuccess) return code;

    cudaLaunchConfig_t config = {};
    config.gridDim =
        dim3(unsigned((p.n + Tile::kRows - 1) / Tile::kRows * split), unsigned((p.m + Tile::kCols - 1) / Tile::kCols));
    config.blockDim = dim3(Tile::kConsumers + 32);
    config.dynamicSmemBytes = Tile::kShared;
    config.stream = stream;
    cudaLaunchAttribute attributes[2];
    attributes[0].id = cudaLaunchAttributeClusterDimension;
    attributes[0].val.clusterDim = {unsigned(split), 1, 1};
    attributes[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[1].val.programmaticStreamSerializationAllowed = 1;
    config.attrs = attributes;
    config.numAttrs = p.pdl ? 2 : 1;
    code = cudaLaunchKernelEx(&config, split_kernel<Tile>, w_map, a_map, p, split);
    if (code != cudaSuccess) cudaGetLastError();
    return code == cudaSuccess ? launched("w8a8")
                               : refuse(code, "w8a8 could not be launched: %s", cudaGetErrorString(code));
}

}  // namespace trtllm::w8a8
