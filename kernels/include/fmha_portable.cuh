// Attention of the context phase for every GPU since Ampere: mma.sync and cp.async.
//
// A block of four warps owns 64 queries of one head, a warp 16 of them. Keys and values pass through shared memory a
// tile at a time: while a tile's scores are computed its values arrive, and while its values are used the next tile's
// keys do. Scores live in registers; a score fragment, rounded, is already the left operand of the second product.
// Source: Dao 2023, "FlashAttention-2".
#pragma once

#include "fmha_common.cuh"

namespace trtllm::fmha {

template <int D>
struct Portable {
    static constexpr int kRows = 64;
    static constexpr int kKeys = D > 128 ? 32 : 64;
    static constexpr int kPitch = D + 8;  // eight rows of an ldmatrix then start in eight different 16-byte banks
    static constexpr int kThreads = 128;
    static constexpr size_t kShared = size_t(kRows + 2 * kKeys) * kPitch * 2;
};

// Rows of 8-element vectors into shared memory; a row `where` gives no address for becomes zeros.
template <typename T, int D, int Rows, typename Where>
__device__ __forceinline__ void load_rows(T* to, Where where, const T* anywhere) {
    constexpr int kVectors = D / 8;
    for (int i = threadIdx.x; i < Rows * kVectors; i += Portable<D>::kThreads) {
        const int row = i / kVectors, vector = i % kVectors;
        const T* from = where(row);
        ptx::copy_async_16(to + row * Portable<D>::kPitch + vector * 8, from ? from + vector * 8 : anywhere,
                           from ? 16 : 0);
    }
}

// d += a (16x16) * b (16x8), summed in float16: twice the rate where float32 sums run at half of it (8.6, 8.9, 12.0)
__device__ __forceinline__ void mma_half_sums(uint32_t (&d)[2], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f16.f16.f16.f16 {%0,%1}, {%2,%3,%4,%5}, {%6,%7}, {%0,%1};"
                 : "+r"(d[0]), "+r"(d[1])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// What one tile adds to the fragments of a product: straight into float32, or summed in float16 and then added.
template <typename T, int N, bool HalfSums>
struct TileSums {
    float (&wide)[N][4];
    __device__ __forceinline__ void add(int i, const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
        ptx::mma_16816<T>(wide[i], a, b0, b1);
    }
    __device__ __forceinline__ void finish() {}
};
template <typename T, int N>
struct TileSums<T, N, true> {
    float (&wide)[N][4];
    uint32_t narrow[N][2] = {};
    __device__ __forceinline__ void add(int i, const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
        mma_half_sums(narrow[i], a, b0, b1);
    }
    __device__ __forceinline__ void finish() {
#pragma unroll
        for (int i = 0; i < N; ++i) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const float2 both = __half22float2(reinterpret_cast<const __half2&>(narrow[i][half]));
                wide[i][2 * half] += both.x;
                wide[i][2 * half + 1] += both.y;
            }
        }
    }
};

template <typename T, int D, bool HalfSums>
__global__ void __launch_bounds__(128) portable_kernel(const __grid_constant__ trtllm_fmha_params p) {
    using Shape = Portable<D>;
    constexpr int kKeys = Shape::kKeys, kPitch = Shape::kPitch;
    constexpr bool kQueriesInRegisters = D <= 128;
    extern __shared__ __align__(128) unsigned char shared[];
    T* const q_tile = reinterpret_cast<T*>(shared);
    T* const k_tile = q_tile + Shape::kRows * kPitch;
    T* const v_tile = k_tile + kKeys * kPitch;

    if (p.pdl) ptx::wait_for_previous_kernel();
    const Sequence s(p, blockIdx.z);
    // the last rows see the most keys under a causal mask: they start first
    const int row0 = int(gridDim.x - 1 - blockIdx.x) * Shape::kRows;
    if (row0 >= s.q_length) return;
    const int head = blockIdx.y, kv_head = head / (p.heads / p.kv_heads);
    const TileRange tiles(p, s, row0, Shape::kRows, kKeys);

    const T* const q = static_cast<const T*>(p.q) + int64_t(s.q_begin + row0) * p.q_token_stride + head * p.q_head_stride;
    const T* const k = static_cast<const T*>(p.k) + s.kv_begin * p.k_token_stride + kv_head * p.k_head_stride;
    const T* const v = static_cast<const T*>(p.v) + s.kv_begin * p.v_token_stride + kv_head * p.v_head_stride;
    const int32_t* const pages =
        p.page_table == nullptr ? nullptr : p.page_table + int64_t(blockIdx.z) * p.page_table_stride;
    auto load_keys = [&](T* to, const T* from, int64_t token_stride, int64_t page_stride, int tile) {
        load_rows<T, D, kKeys>(
            to,
            [&](int row) -> const T* {
                const int j = tile * kKeys + row;
                if (j >= s.kv_length) return nullptr;
                if (pages == nullptr) return from + j * token_stride;
                return from + pages[j / p.page_size] * page_stride + (j % p.page_size) * token_stride;
            },
            from);
    };

    load_rows<T, D, Shape::kRows>(
        q_tile, [&](int row) -> const T* { return row0 + row < s.q_length ? q + row * p.q_token_stride : nullptr; }, q);
    if (tiles.first < tiles.end) load_keys(k_tile, k, p.k_token_stride, p.k_page_stride, tiles.end - 1);
    ptx::copy_async_commit();

    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int position = row0 + warp * 16 + lane / 4 + s.shift;
    const bool extras = p.soft_cap > 0.0f || p.alibi_slopes != nullptr;
    const float slope = p.alibi_slopes != nullptr ? p.alibi_slopes[head] : 0.0f;
    const float c = extras ? 1.0f : p.scale * kLog2e;

    // the addresses at which this lane takes part in ldmatrix: rows of the queries, of the keys, of the values
    const T* const q_lane = q_tile + (warp * 16 + lane % 16) * kPitch + (lane / 16) * 8;
    const T* const k_lane = k_tile + ((lane / 16) * 8 + lane % 8) * kPitch + (lane / 8 % 2) * 8;
    const T* const v_lane = v_tile + (lane % 16) * kPitch + (lane / 16) * 8;

    Softmax softmax;
    float sums[D / 8][4] = {};
    uint32_t q_fragment[kQueriesInRegisters ? D / 16 : 1][4];
    for (int tile = tiles.end - 1; tile >= tiles.first; --tile) {
        ptx::copy_async_wait<0>();
        __syncthreads();
        load_keys(v_tile, v, p.v_token_stride, p.v_page_stride, tile);
        ptx::copy_async_commit();
        if (kQueriesInRegisters && tile == tiles.end - 1) {
#pragma unroll
            for (int i = 0; i < D / 16; ++i) ptx::ldmatrix_x4(q_fragment[kQueriesInRegisters ? i : 0], q_lane + i * 16);
        }
        float scores[kKeys / 8][4] = {};
        TileSums<T, kKeys / 8, HalfSums> score_sums{scores};
#pragma unroll
        for (int i = 0; i < D / 16; ++i) {
            if (!kQueriesInRegisters) ptx::ldmatrix_x4(q_fragment[0], q_lane + i * 16);
            const auto& a = q_fragment[kQueriesInRegisters ? i : 0];
#pragma unroll
            for (int n = 0; n < kKeys / 16; ++n) {
                uint32_t b[4];
                ptx::ldmatrix_x4(b, k_lane + n * 16 * kPitch + i * 16);
                score_sums.add(2 * n, a, b[0], b[1]);
                score_sums.add(2 * n + 1, a, b[2], b[3]);
            }
        }
        score_sums.finish();
        const int column = tile * kKeys + 2 * (lane % 4);
        if (extras) shape_scores(scores, p, slope, column, position);
        const bool inside = (tile + 1) * kKeys <= s.kv_length &&
                            (!p.causal || (tile + 1) * kKeys <= row0 + s.shift + 1) &&
                            (p.window == 0 || tile * kKeys > row0 + Shape::kRows - 1 + s.shift - p.window);
        if (!inside) hide(scores, column, position, 8, s.kv_length, p.causal, p.window);
        float shrink[2];
        softmax.step(scores, c, shrink);
#pragma unroll
        for (int i = 0; i < D / 8; ++i) {
#pragma unroll
            for (int e = 0; e < 4; ++e) sums[i][e] *= shrink[e / 2];
        }

        ptx::copy_async_wait<0>();
        __syncthreads();
        if (tile > tiles.first) load_keys(k_tile, k, p.k_token_stride, p.k_page_stride, tile - 1);
        ptx::copy_async_commit();
        // (narrow sums beside the wide ones of 256 columns would not fit into the registers)
        TileSums<T, D / 8, HalfSums && D <= 128> value_sums{sums};
#pragma unroll
        for (int j = 0; j < kKeys / 16; ++j) {
            const uint32_t a[4] = {pack<T>(scores[2 * j][0], scores[2 * j][1]), pack<T>(scores[2 * j][2], scores[2 * j][3]),
                                   pack<T>(scores[2 * j + 1][0], scores[2 * j + 1][1]),
                                   pack<T>(scores[2 * j + 1][2], scores[2 * j + 1][3])};
#pragma unroll
            for (int n = 0; n < D / 16; ++n) {
                uint32_t b[4];
                ptx::ldmatrix_x4_trans(b, v_lane + j * 16 * kPitch + n * 16);
                value_sums.add(2 * n, a, b[0], b[1]);
                value_sums.add(2 * n + 1, a, b[2], b[3]);
            }
        }
        value_sums.finish();
    }
    ptx::copy_async_wait<0>();
    __syncthreads();
    if (p.pdl) ptx::let_next_kernel_start();

    float inverse[2], lse[2];
    softmax.finish(c, inverse, lse);
    // through the warp's own rows of the query tile, so that a row leaves in vectors of 16 bytes
    T* const mine = q_tile + warp * 16 * kPitch;
#pragma unroll
    for (int i = 0; i < D / 8; ++i) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            *reinterpret_cast<uint32_t*>(mine + (lane / 4 + 8 * half) * kPitch + 8 * i + 2 * (lane % 4)) =
                pack<T>(sums[i][2 * half] * inverse[half], sums[i][2 * half + 1] * inverse[half]);
        }
    }
    __syncwarp();
    const int rows = min(16, s.q_length - row0 - warp * 16);
    T* const out = static_cast<T*>(p.out) + int64_t(s.q_begin + row0 + warp * 16) * p.out_token_stride +
                   head * p.out_head_stride;
    for (int i = lane; i < rows * (D / 8); i += 32) {
        const int row = i / (D / 8), vector = i % (D / 8);
        *reinterpret_cast<uint4*>(out + row * p.out_token_stride + vector * 8) =
            *reinterpret_cast<const uint4*>(mine + row * kPitch + vector * 8);
    }
    if (p.lse != nullptr && lane % 4 == 0) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int row = lane / 4 + 8 * half;
            if (row < rows) p.lse[head * p.q_tokens + s.q_begin + row0 + warp * 16 + row] = lse[half];
        }
    }
}

}  // namespace trtllm::fmha
