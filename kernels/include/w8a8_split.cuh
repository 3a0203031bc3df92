// The 8-bit product for few activation rows, on Hopper: bound by reading the weights once.
//
// The weights take the matrix unit's operand of 64 rows and the activations its narrow one (8 to 128 columns), so that
// one token wastes nothing but idle arithmetic. One warp streams both operands through a deep ring of shared-memory
// stages with the copy engine; each warpgroup multiplies 64 weight rows. The K axis is split over the blocks of a
// cluster, which send their partial sums to the block that finishes them and are added in rank order: no workspace,
// the same bits every time.
#pragma once

#include "cluster_sums.cuh"
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
    static constexpr int kEights = kCols / 8, kItems = kRows / 16 * kEights;  // of 16 weight rows by 8 activation rows
    // parts of sums come to a place of their own where that is small, else to the stages when nobody reads them any more
    static constexpr bool kApart = kItems <= 16;
    static constexpr int kReceived = sums::received_bytes(kItems);
    static constexpr int kShared = kStages * kStageBytes + (kApart ? kReceived : 0) + (2 * kStages + 1) * 8;
    static_assert(kReceived <= kStages * kStageBytes, "sums take the stages' place");
};

__device__ __forceinline__ uint32_t bits(float v) { return __float_as_uint(v); }
__device__ __forceinline__ uint32_t bits(int32_t v) { return uint32_t(v); }
template <typename Sum>
__device__ __forceinline__ Sum from_bits(uint32_t v);
template <>
__device__ __forceinline__ float from_bits<float>(uint32_t v) {
    return __uint_as_float(v);
}
template <>
__device__ __forceinline__ int32_t from_bits<int32_t>(uint32_t v) {
    return int32_t(v);
}

/// From sums to outputs, for an item of 16 weight rows by 8 activation rows as the matrix unit holds it.
class ItemEnd {
public:
    /// Asks for everything the end needs besides the sums.
    __device__ __forceinline__ ItemEnd(const trtllm_w8a8_params& params, int64_t first_n, int64_t first_m, int lane)
        : p(params), n0(first_n), m0(first_m), lane(lane), half(params.out_dtype == TRTLLM_FLOAT16) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const int64_t n = min(n0 + lane / 4 + 8 * h, p.n - 1), m = min(m0 + lane % 4 * 2 + h, p.m - 1);
            w_scale[h] = p.w_scale[p.w_scale_per_channel ? n : 0];
            a_scale[h] = p.a_scale[p.a_scale_per_token ? m : 0];
            if (p.bias) bias[h] = load_16bit(p.bias, n, half);
        }
        if (!p.residual) return;
#pragma unroll
        for (int e = 0; e < 4; ++e) {
            const int64_t n = min(n0 + lane / 4 + e / 2 * 8, p.n - 1), m = min(m0 + lane % 4 * 2 + e % 2, p.m - 1);
            residual[e] = load_16bit(p.residual, m * p.residual_stride + n, half);
        }
    }
    template <typename Sum>
    __device__ __forceinline__ void write(const Sum (&sum)[4]) const {
        float v[4];
#pragma unroll
        for (int e = 0; e < 4; ++e) {
            v[e] = scaled(sum[e], a_scale[e % 2], w_scale[e / 2]);
            if (p.bias) v[e] = __fadd_rn(v[e], bias[e / 2]);
            if (p.residual) v[e] = __fadd_rn(v[e], residual[e]);
        }
        const bool wide = p.out_stride % 2 == 0 && reinterpret_cast<uintptr_t>(p.out) % 4 == 0;
        const int64_t m = m0 + lane / 4;
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const uint32_t pair = sums::transposed(pack(v[2 * h], v[2 * h + 1], half));
            const int64_t n = n0 + 8 * h + lane % 4 * 2;
            if (m >= p.m || n >= p.n) continue;
            uint16_t* out = static_cast<uint16_t*>(p.out) + m * p.out_stride + n;
            if (wide && n + 1 < p.n) {
                *reinterpret_cast<uint32_t*>(out) = pair;
            } else {
                out[0] = uint16_t(pair);
                if (n + 1 < p.n) out[1] = uint16_t(pair >> 16);
            }
        }
    }

private:
    const trtllm_w8a8_params& p;
    int64_t n0, m0;
    int lane;
    bool half;
    float w_scale[2], a_scale[2], bias[2] = {}, residual[4] = {};
};

template <typename Tile>
__global__ void __launch_bounds__(Tile::kConsumers + 32)
    split_kernel(const __grid_constant__ CUtensorMap w_map, const __grid_constant__ CUtensorMap a_map,
                 const trtllm_w8a8_params p, int split) {
#ifdef TRTLLM_SM90A
    using Sum = typename Tile::Type::Sum;
    constexpr int kRows = Tile::kRows, kCols = Tile::kCols, kStages = Tile::kStages;
    extern __shared__ __align__(1024) uint8_t shared[];
    uint8_t* after = shared + kStages * Tile::kStageBytes;
    uint64_t* full = reinterpret_cast<uint64_t*>(after + (Tile::kApart ? Tile::kReceived : 0));
    uint64_t* empty = full + kStages;
    uint64_t* arrived = empty + kStages;
    const uint32_t received = ptx::shared_address(Tile::kApart ? after : shared);

    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int rank = int(blockIdx.x) % split;
    const int n0 = int(blockIdx.x) / split * kRows, m0 = int(blockIdx.y) * kCols;
    const int blocks = int((p.k + 127) / 128);
    const sums::Shares<Tile::kItems> shares = {split, rank};
    const int begin = int(int64_t(blocks) * rank / split), count = int(int64_t(blocks) * (rank + 1) / split) - begin;

    if (threadIdx.x == 0) {
        for (int s = 0; s < kStages; ++s) {
            ptx::barrier_init(full + s, 1);
            ptx::barrier_init(empty + s, Tile::kConsumers / 32);
        }
        ptx::barrier_init(arrived, 1);
        ptx::barrier_init_fence();
        if (split > 1) ptx::barrier_expect(arrived, shares.bytes());
    }
    __syncthreads();
    // others may send once they have waited for this
    if (split > 1) sums::arrive_relaxed();
    const auto wait_to_send = [&] {
        sums::wait_for_cluster();
        if (!Tile::kApart) {
            // and once nobody reads the stages any more
            sums::arrive_relaxed();
            sums::wait_for_cluster();
        }
    };
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
        __syncwarp();
        if (split > 1) wait_to_send();
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
        const auto sum_of = [&](int i) -> Sum {
            if constexpr (std::is_same_v<Sum, float>) return total[i];
            else return part[i];
        };
        if (split == 1) {
            ptx::wait_for_previous_kernel();
#pragma unroll
            for (int j = 0; j < Tile::kEights; ++j) {
                if (m0 + 8 * j >= p.m) break;
                const Sum sum[4] = {sum_of(4 * j), sum_of(4 * j + 1), sum_of(4 * j + 2), sum_of(4 * j + 3)};
                ItemEnd(p, n0 + warp * 16, m0 + 8 * j, lane).write(sum);
            }
            return;
        }
        wait_to_send();
#pragma unroll
        for (int j = 0; j < Tile::kEights; ++j) {
            shares.send(warp * Tile::kEights + j, lane, received, ptx::shared_address(arrived), bits(sum_of(4 * j)),
                        bits(sum_of(4 * j + 1)), bits(sum_of(4 * j + 2)), bits(sum_of(4 * j + 3)));
        }
        ptx::wait_for_previous_kernel();
        for (int local = warp; local < shares.count(); local += Tile::kConsumers / 32) {
            const int item = shares.first() + local;
            const ItemEnd end(p, n0 + item / Tile::kEights * 16, m0 + item % Tile::kEights * 8, lane);
            wait(arrived, 0);
            Sum sum[4] = {0, 0, 0, 0};
            for (int q = 0; q < split; ++q) {
                const uint4 v = shares.part(received, local, q, lane);
                sum[0] += from_bits<Sum>(v.x), sum[1] += from_bits<Sum>(v.y);
                sum[2] += from_bits<Sum>(v.z), sum[3] += from_bits<Sum>(v.w);
            }
            end.write(sum);
        }
        wait(arrived, 0);  // no block may go while others send to it
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
