// The 8-bit product for many activation rows, on Hopper: bound by the matrix units.
//
// A cluster of two blocks works on tiles of 256 activation rows by `kCols` weight rows; each block has 128 of the rows,
// and loads half of the weights for both (multicast), which halves what the L2 cache must deliver. In a block one warp
// streams 128 bytes of K at a time into a ring of stages; two warpgroups multiply 64 rows each. Blocks stay for many
// tiles: while a warpgroup converts and stores its sums, the ring fills for the next tile and the other one keeps the
// matrix unit busy. Sums leave through shared memory (stmatrix) and the copy engine.
#pragma once

#include "registry.hpp"
#include "w8a8_epilogue.cuh"
#include "w8a8_launch.hpp"
#include "w8a8_sm90.cuh"

namespace trtllm::w8a8 {

/// `Promote`: partial sums of 128 products are added up in float32 outside the matrix unit.
template <typename TypeT, int ColsT, int StagesT, bool PromoteT>
struct PersistentTile {
    using Type = TypeT;
    static constexpr int kRows = 128, kCols = ColsT, kStages = StagesT;
    static constexpr bool kPromote = PromoteT;
    static constexpr int kActivationBytes = kRows * 128, kStageBytes = kActivationBytes + kCols * 128;
    static constexpr int kOutBytes = 64 * 128;  // 64 rows by 64 columns of 16 bits, two for each warpgroup
    static constexpr int kShared = kStages * kStageBytes + 4 * kOutBytes + 2 * kStages * 8;
    static constexpr int kThreads = 384;
};

// Tiles of a cluster in an order that keeps the operands of concurrent tiles few: strips of 8 tiles of rows.
struct TileOrder {
    int row_tiles, column_tiles;
    __device__ __forceinline__ void at(int tile, int& row, int& column) const {
        constexpr int kStrip = 8;
        const int strip = tile / (kStrip * column_tiles), within = tile - strip * kStrip * column_tiles;
        const int height = min(kStrip, row_tiles - strip * kStrip);
        column = within / height;
        row = strip * kStrip + within - column * height;
    }
};

// Two neighbouring values of the residual, where they exist.
__device__ __forceinline__ void add_pair(float& low, float& high, const trtllm_w8a8_params& p, int64_t m, int64_t n,
                                         bool half) {
    if (m >= p.m) return;
    const uint16_t* at = static_cast<const uint16_t*>(p.residual) + m * p.residual_stride + n;
    if (n < p.n) low = __fadd_rn(low, unpack(at[0], half));
    if (n + 1 < p.n) high = __fadd_rn(high, unpack(at[1], half));
}

// A box of 64 by 64 outputs for rows that the copy engine cannot address (not a multiple of 16 bytes apart).
__device__ __forceinline__ void store_plainly(const uint8_t* buffer, const trtllm_w8a8_params& p, int64_t m0,
                                              int64_t n0) {
#pragma unroll 1
    for (int i = threadIdx.x % 128; i < 64 * 64; i += 128) {
        const int row = i / 64, column = i % 64;
        if (m0 + row >= p.m || n0 + column >= p.n) continue;
        const int piece = (column / 8) ^ (row % 8);
        static_cast<uint16_t*>(p.out)[(m0 + row) * p.out_stride + n0 + column] =
            *reinterpret_cast<const uint16_t*>(buffer + row * 128 + piece * 16 + column % 8 * 2);
    }
}

/// `Extras`: there may be a bias or a residual; without them the epilogue is shorter.
template <typename Tile, bool Extras>
__global__ void __launch_bounds__(Tile::kThreads, 1)
    persistent_kernel(const __grid_constant__ CUtensorMap a_map, const __grid_constant__ CUtensorMap w_map,
                      const __grid_constant__ CUtensorMap out_map, const trtllm_w8a8_params p, int copy_out) {
#ifdef TRTLLM_SM90A
    using Sum = typename Tile::Type::Sum;
    constexpr int kCols = Tile::kCols, kStages = Tile::kStages;
    extern __shared__ __align__(1024) uint8_t shared[];
    uint8_t* staging = shared + kStages * Tile::kStageBytes;
    uint64_t* full = reinterpret_cast<uint64_t*>(staging + 4 * Tile::kOutBytes);
    uint64_t* empty = full + kStages;

    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const uint32_t rank = cluster_rank();
    const int blocks = int((p.k + 127) / 128);
    const TileOrder order = {int((p.m + 255) / 256), int((p.n + kCols - 1) / kCols)};
    const int tiles = order.row_tiles * order.column_tiles, clusters = gridDim.x / 2;

    if (threadIdx.x == 0) {
        for (int s = 0; s < kStages; ++s) {
            ptx::barrier_init(full + s, 1);
            ptx::barrier_init(empty + s, 16);  // the 8 consumer warps of both blocks
        }
        ptx::barrier_init_fence();
    }
    cluster_arrive();
    cluster_wait();
    ptx::let_next_kernel_start();
    ptx::wait_for_previous_kernel();

    if (warp < 4) {
        give_registers<40>();
        if (warp == 0 && lane == 0) {
            int i = 0;  // counts stages over all tiles
            for (int tile = blockIdx.x / 2; tile < tiles; tile += clusters) {
                int row, column;
                order.at(tile, row, column);
                const int m0 = row * 256 + int(rank) * 128, n0 = column * kCols + int(rank) * (kCols / 2);
                for (int b = 0; b < blocks; ++b, ++i) {
                    const int s = i % kStages;
                    if (i >= kStages) wait(empty + s, (i / kStages - 1) & 1);
                    uint8_t* stage = shared + s * Tile::kStageBytes;
                    ptx::barrier_expect(full + s, Tile::kStageBytes);
                    copy_box(stage, a_map, b * 128, m0, full + s, kEvictNormal);
                    copy_box_multicast(stage + Tile::kActivationBytes + rank * (kCols / 2) * 128, w_map, b * 128, n0,
                                       full + s, 3, kEvictNormal);
                }
            }
        }
    } else {
        take_registers<232>();
        const int group = warp / 4 - 1, quarter = warp % 4;
        uint8_t* mine = staging + group * 2 * Tile::kOutBytes;
        const bool half = p.out_dtype == TRTLLM_FLOAT16;
        Sum sum[kCols / 2];
        int i = 0, turn = 0;  // stages over all tiles; which of the two output buffers
        const auto release = [&](int s) {
            if (lane == 0) ptx::barrier_arrive(empty + s);
            if (lane == 1) arrive_in(empty + s, rank ^ 1);
        };
        for (int tile = blockIdx.x / 2; tile < tiles; tile += clusters) {
            int row, column;
            order.at(tile, row, column);
            const int m0 = row * 256 + int(rank) * 128 + group * 64, n0 = column * kCols;
            if constexpr (Tile::kPromote) {
#pragma unroll
                for (int j = 0; j < kCols / 2; ++j) sum[j] = 0;
                Sum part[kCols / 2];
                for (int b = 0; b < blocks; ++b, ++i) {
                    const int s = i % kStages;
                    wait(full + s, (i / kStages) & 1);
                    const uint8_t* stage = shared + s * Tile::kStageBytes;
                    const uint64_t a = descriptor(stage + group * 64 * 128);
                    const uint64_t w = descriptor(stage + Tile::kActivationBytes);
                    pin(part);
                    wgmma_fence();
#pragma unroll
                    for (int step = 0; step < 4; ++step) {
                        Wgmma<typename Tile::Type, kCols>::run(part, a + 2 * step, w + 2 * step, step);
                    }
                    wgmma_commit();
                    wgmma_wait<0>();
                    pin(part);
                    release(s);
#pragma unroll
                    for (int j = 0; j < kCols / 2; ++j) sum[j] += part[j];
                }
            } else {
                for (int b = 0; b < blocks; ++b, ++i) {
                    const int s = i % kStages;
                    wait(full + s, (i / kStages) & 1);
                    const uint8_t* stage = shared + s * Tile::kStageBytes;
                    const uint64_t a = descriptor(stage + group * 64 * 128);
                    const uint64_t w = descriptor(stage + Tile::kActivationBytes);
                    pin(sum);
                    wgmma_fence();
#pragma unroll
                    for (int step = 0; step < 4; ++step) {
                        Wgmma<typename Tile::Type, kCols>::run(sum, a + 2 * step, w + 2 * step, b + step);
                    }
                    wgmma_commit();
                    // all but the products just queued are done, and their stage is free
                    wgmma_wait<1>();
                    pin(sum);
                    if (b > 0) release((i - 1) % kStages);
                }
                wgmma_wait<0>();
                pin(sum);
                release((i - 1) % kStages);
            }

            const int64_t row_a = m0 + quarter * 16 + lane / 4, row_b = row_a + 8;  // the two rows of this thread
            const float scale_a = p.a_scale[p.a_scale_per_token ? min(row_a, p.m - 1) : 0];
            const float scale_b = p.a_scale[p.a_scale_per_token ? min(row_b, p.m - 1) : 0];
#pragma unroll
            for (int chunk = 0; chunk < kCols / 64; ++chunk) {
                // a lane reads scale and bias of two columns; shuffles hand them to the threads of a column
                const int64_t own = n0 + chunk * 64 + lane * 2;
                float w_scale[2], bias[2] = {0, 0};
#pragma unroll
                for (int e = 0; e < 2; ++e) {
                    const int64_t n = min(own + e, p.n - 1);
                    w_scale[e] = p.w_scale[p.w_scale_per_channel ? n : 0];
                    if (Extras && p.bias) bias[e] = load_16bit(p.bias, n, half);
                }
                uint8_t* buffer = mine + turn * Tile::kOutBytes;
                turn ^= 1;
                // what was stored from this buffer before has been read
                if (quarter == 0 && lane == 0) store_wait_read<1>();
                ptx::named_barrier_sync<128>(1 + group);
#pragma unroll
                for (int j = 0; j < 8; j += 2) {
                    uint32_t packed[4];
#pragma unroll
                    for (int h = 0; h < 2; ++h) {
                        const int source = (j + h) * 4 + lane % 4;
                        const float w0 = __shfl_sync(~0u, w_scale[0], source),
                                    w1 = __shfl_sync(~0u, w_scale[1], source);
                        const Sum* d = sum + chunk * 32 + (j + h) * 4;
                        float v[4] = {scaled(d[0], scale_a, w0), scaled(d[1], scale_a, w1), scaled(d[2], scale_b, w0),
                                      scaled(d[3], scale_b, w1)};
                        if constexpr (Extras) {
                            if (p.bias) {
                                const float b0 = __shfl_sync(~0u, bias[0], source);
                                const float b1 = __shfl_sync(~0u, bias[1], source);
                                v[0] = __fadd_rn(v[0], b0), v[1] = __fadd_rn(v[1], b1);
                                v[2] = __fadd_rn(v[2], b0), v[3] = __fadd_rn(v[3], b1);
                            }
                            if (p.residual) {
                                const int64_t n = n0 + chunk * 64 + (j + h) * 8 + lane % 4 * 2;
                                add_pair(v[0], v[1], p, row_a, n, half);
                                add_pair(v[2], v[3], p, row_b, n, half);
                            }
                        }
                        packed[2 * h] = pack(v[0], v[1], half);
                        packed[2 * h + 1] = pack(v[2], v[3], half);
                    }
                    const int at_row = quarter * 16 + lane % 16, at = j + lane / 16;
                    store_matrices(buffer + at_row * 128 + ((at ^ (at_row % 8)) * 16), packed);
                }
                ptx::fence_async_shared();
                ptx::named_barrier_sync<128>(1 + group);
                if (!copy_out) {
                    store_plainly(buffer, p, m0, n0 + chunk * 64);
                } else if (quarter == 0 && lane == 0) {
                    store_box(out_map, n0 + chunk * 64, m0, buffer);
                    store_commit();
                }
            }
        }
        if (copy_out && quarter == 0 && lane == 0) store_wait_read<0>();
    }
    // a block stays while the other one may still arrive at its barriers
    __syncwarp();
    cluster_arrive_relaxed();
    cluster_wait();
#endif
}

template <typename Tile, bool Extras>
cudaError_t launch_persistent_with(const trtllm_w8a8_params& p, cudaStream_t stream) {
    static unsigned long long allowed = 0;
    cudaError_t code =
        allow_shared(reinterpret_cast<const void*>(persistent_kernel<Tile, Extras>), Tile::kShared, allowed);
    if (code != cudaSuccess) return code;
    CUtensorMap a_map, w_map, out_map;
    code = tensor_map(&a_map, p.a, 1, p.m, p.k, p.a_stride, 128, 128);
    if (code != cudaSuccess) return code;
    code = tensor_map(&w_map, p.w, 1, p.n, p.k, p.w_stride, Tile::kCols / 2, 128);
    if (code != cudaSuccess) return code;
    // the copy engine stores 16 bytes at a time: with other n it would write past the end of the rows
    const bool copy_out = p.n % 8 == 0 && p.out_stride % 8 == 0 && reinterpret_cast<uintptr_t>(p.out) % 16 == 0;
    out_map = a_map;
    if (copy_out) {
        code = tensor_map(&out_map, p.out, 2, p.m, p.n, p.out_stride, 64, 64);
        if (code != cudaSuccess) return code;
    }
    const int64_t tiles = (p.m + 255) / 256 * ((p.n + Tile::kCols - 1) / Tile::kCols);
    const int clusters = int(tiles < multiprocessors() / 2 ? tiles : multiprocessors() / 2);

    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(unsigned(2 * clusters));
    config.blockDim = dim3(Tile::kThreads);
    config.dynamicSmemBytes = Tile::kShared;
    config.stream = stream;
    cudaLaunchAttribute attributes[2];
    attributes[0].id = cudaLaunchAttributeClusterDimension;
    attributes[0].val.clusterDim = {2, 1, 1};
    attributes[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[1].val.programmaticStreamSerializationAllowed = 1;
    config.attrs = attributes;
    config.numAttrs = p.pdl ? 2 : 1;
    code = cudaLaunchKernelEx(&config, persistent_kernel<Tile, Extras>, a_map, w_map, out_map, p, int(copy_out));
    if (code != cudaSuccess) cudaGetLastError();
    return code == cudaSuccess ? launched("w8a8")
                               : refuse(code, "w8a8 could not be launched: %s", cudaGetErrorString(code));
}

template <typename Tile>
cudaError_t launch_persistent(const trtllm_w8a8_params& p, cudaStream_t stream) {
    return p.bias || p.residual ? launch_persistent_with<Tile, true>(p, stream)
                                : launch_persistent_with<Tile, false>(p, stream);
}

}  // namespace trtllm::w8a8
