// The 8-bit product with the matrix instructions of compute capability 8.0 (int8) and 8.9 (float8 E4M3): asynchronous
// copies into a ring of stages of 128 bytes of K, ldmatrix, m16n8k32.
// Source: PTX ISA 9.0, "Matrix Fragments for mma.m16n8k32".
#pragma once

#include <type_traits>

#include "registry.hpp"
#include "w8a8_epilogue.cuh"
#include "w8a8_launch.hpp"
#include "ptx.cuh"

namespace trtllm::w8a8 {

__device__ __forceinline__ void mma_8bit(int32_t (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm volatile("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
__device__ __forceinline__ void mma_8bit(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
#if __CUDA_ARCH__ >= 890
    asm volatile(
        "mma.sync.aligned.m16n8k32.row.col.f32.e4m3.e4m3.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#endif
}

/// A block of `kRows` activation rows by `kCols` weight rows, a warp of kRows / WarpsM by kCols / WarpsN.
template <typename SumT, int RowsT, int ColsT, int WarpsM, int WarpsN, int StagesT>
struct PortableTile {
    using Sum = SumT;
    static constexpr int kRows = RowsT, kCols = ColsT, kStages = StagesT;
    static constexpr int kWarpsM = WarpsM, kWarpsN = WarpsN, kThreads = 32 * WarpsM * WarpsN;
    static constexpr int kStageBytes = (RowsT + ColsT) * 128, kShared = StagesT * kStageBytes;
};

// 128 bytes of `rows` rows from `from` on, as 16-byte pieces whose place is exchanged by row (no bank conflicts); what
// lies outside the matrix becomes zero.
template <int Rows, int Threads>
__device__ __forceinline__ void copy_rows(uint8_t* to, const uint8_t* from, int64_t row0, int64_t rows, int64_t stride,
                                          int64_t k0, int64_t k) {
#pragma unroll
    for (int i = threadIdx.x; i < Rows * 8; i += Threads) {
        const int row = i / 8, piece = i % 8;
        const bool inside = row0 + row < rows && k0 + piece * 16 < k;
        const uint8_t* at = inside ? from + (row0 + row) * stride + k0 + piece * 16 : from;
        ptx::copy_async_16(to + row * 128 + ((piece ^ (row % 8)) * 16), at, inside ? 16 : 0);
    }
}

template <typename Tile>
__global__ void __launch_bounds__(Tile::kThreads) portable_kernel(const trtllm_w8a8_params p) {
#if __CUDA_ARCH__ >= 890
    constexpr bool kServed = true;
#else
    constexpr bool kServed = std::is_same_v<typename Tile::Sum, int32_t>;
#endif
    if constexpr (kServed) {
        using Sum = typename Tile::Sum;
        constexpr int kStages = Tile::kStages, kTilesM = Tile::kRows / Tile::kWarpsM / 16;
        constexpr int kTilesN = Tile::kCols / Tile::kWarpsN / 8;
        extern __shared__ __align__(1024) uint8_t shared[];
        const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
        const int64_t m0 = int64_t(blockIdx.y) * Tile::kRows, n0 = int64_t(blockIdx.x) * Tile::kCols;
        const int warp_m = warp / Tile::kWarpsN * (kTilesM * 16), warp_n = warp % Tile::kWarpsN * (kTilesN * 8);
        const int blocks = int((p.k + 127) / 128);
        ptx::wait_for_previous_kernel();

        const auto copy = [&](int b) {
            if (b < blocks) {
                uint8_t* stage = shared + b % kStages * Tile::kStageBytes;
                copy_rows<Tile::kRows, Tile::kThreads>(stage, static_cast<const uint8_t*>(p.a), m0, p.m, p.a_stride,
                                                       int64_t(b) * 128, p.k);
                copy_rows<Tile::kCols, Tile::kThreads>(stage + Tile::kRows * 128, static_cast<const uint8_t*>(p.w), n0,
                                                       p.n, p.w_stride, int64_t(b) * 128, p.k);
            }
            ptx::copy_async_commit();
        };
        Sum part[kTilesM][kTilesN][4] = {};
        float total[kTilesM][kTilesN][4] = {};
#pragma unroll
        for (int b = 0; b < kStages - 1; ++b) copy(b);
        for (int b = 0; b < blocks; ++b) {
            ptx::copy_async_wait<kStages - 2>();
            __syncthreads();
            copy(b + kStages - 1);
            const uint8_t* stage_a = shared + b % kStages * Tile::kStageBytes;
            const uint8_t* stage_w = stage_a + Tile::kRows * 128;
#pragma unroll
            for (int step = 0; step < 4; ++step) {
                uint32_t a[kTilesM][4], w[kTilesN / 2][4];
#pragma unroll
                for (int i = 0; i < kTilesM; ++i) {
                    const int row = warp_m + i * 16 + lane % 16, piece = step * 2 + lane / 16;
                    ptx::ldmatrix_x4(a[i], stage_a + row * 128 + ((piece ^ (row % 8)) * 16));
                }
#pragma unroll
                for (int j = 0; j < kTilesN / 2; ++j) {
                    const int row = warp_n + j * 16 + lane % 8 + lane / 16 * 8, piece = step * 2 + lane / 8 % 2;
                    ptx::ldmatrix_x4(w[j], stage_w + row * 128 + ((piece ^ (row % 8)) * 16));
                }
#pragma unroll
                for (int i = 0; i < kTilesM; ++i) {
#pragma unroll
                    for (int j = 0; j < kTilesN; ++j)
                        mma_8bit(part[i][j], a[i], w[j / 2][j % 2 * 2], w[j / 2][j % 2 * 2 + 1]);
                }
            }
            if constexpr (std::is_same_v<Sum, float>) {
                // the matrix unit keeps too few bits to sum all of K
#pragma unroll
                for (int i = 0; i < kTilesM; ++i) {
#pragma unroll
                    for (int j = 0; j < kTilesN; ++j) {
#pragma unroll
                        for (int e = 0; e < 4; ++e) {
                            total[i][j][e] += part[i][j][e];
                            part[i][j][e] = 0;
                        }
                    }
                }
            }
        }

        const bool half = p.out_dtype == TRTLLM_FLOAT16;
        uint16_t* out = static_cast<uint16_t*>(p.out);
#pragma unroll
        for (int i = 0; i < kTilesM; ++i) {
#pragma unroll
            for (int j = 0; j < kTilesN; ++j) {
#pragma unroll
                for (int e = 0; e < 4; ++e) {
                    const int64_t m = m0 + warp_m + i * 16 + lane / 4 + e / 2 * 8;
                    const int64_t n = n0 + warp_n + j * 8 + lane % 4 * 2 + e % 2;
                    if (m >= p.m || n >= p.n) continue;
                    float sum;
                    if constexpr (std::is_same_v<Sum, float>) {
                        sum = total[i][j][e];
                    } else {
                        sum = as_float(part[i][j][e]);
                    }
                    float v =
                        scaled(sum, p.a_scale[p.a_scale_per_token ? m : 0], p.w_scale[p.w_scale_per_channel ? n : 0]);
                    if (p.bias) v = __fadd_rn(v, load_16bit(p.bias, n, half));
                    if (p.residual) v = __fadd_rn(v, load_16bit(p.residual, m * p.residual_stride + n, half));
                    out[m * p.out_stride + n] = uint16_t(pack(v, 0.0f, half));
                }
            }
        }
    }
}

template <typename Tile>
cudaError_t launch_portable_tile(const trtllm_w8a8_params& p, cudaStream_t stream) {
    static unsigned long long allowed = 0;
    cudaError_t code = allow_shared(reinterpret_cast<const void*>(portable_kernel<Tile>), Tile::kShared, allowed);
    if (code != cudaSuccess) return code;
    const dim3 grid(unsigned((p.n + Tile::kCols - 1) / Tile::kCols), unsigned((p.m + Tile::kRows - 1) / Tile::kRows));
    portable_kernel<Tile><<<grid, Tile::kThreads, Tile::kShared, stream>>>(p);
    return launched("w8a8");
}

template <typename Sum>
cudaError_t launch_portable_type(const trtllm_w8a8_params& p, cudaStream_t stream) {
    if (p.m <= 16) return launch_portable_tile<PortableTile<Sum, 16, 64, 1, 4, 4>>(p, stream);
    if (p.m <= 64) return launch_portable_tile<PortableTile<Sum, 64, 64, 2, 2, 4>>(p, stream);
    // two sets of sums need narrower tiles
    if constexpr (std::is_same_v<Sum, float>) {
        return launch_portable_tile<PortableTile<Sum, 128, 64, 4, 2, 3>>(p, stream);
    } else {
        return launch_portable_tile<PortableTile<Sum, 128, 128, 2, 4, 3>>(p, stream);
    }
}

}  // namespace trtllm::w8a8
