// Products for up to 8 tokens: bound by how fast weights stream in, so everything serves that.
//
// Work is split by stripes of 16 rows. A block's warps share a stripe by slices of K (or several stripes, where K is
// short) and every warp streams its tiles through a ring of its own in shared memory: no barrier between warps while
// streaming, tens of kilobytes in flight a multiprocessor, and the first of them asked for before the wait for the
// previous kernel, because weights do not depend on it. Tokens are the second operand of mma.m16n8k16: one token costs
// as many instructions as eight, few enough for int4 at full bandwidth, where ordinary multiplications would not do.
// Slices are summed in a fixed order: first a block's warps, then the blocks of a cluster through distributed shared
// memory. Results are bit-identical between runs.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "ptx.cuh"
#include "weight_only.hpp"
#include "weight_only_convert.cuh"

namespace trtllm::weight_only {

enum class Kind { kInt4, kInt8, kFp8, kDense };

// How one launch is cut; computed on the host (plan() in gemv.cu), the same for every block.
struct GemvPlan {
    int warps;            // a block; slices * groups
    int slices;           // warps that share a stripe
    int groups;           // stripes a block works on at a time
    int rounds;           // times it does so
    int grid;             // clusters (of `cluster` blocks) launched
    int cluster;          // blocks that share a stripe's K
    int stage_tiles;      // tiles in one stage of a warp's ring
    int tile_bytes;
    int tiles;            // along K
    int stripes;          // of N, padding left out
    int x_bytes;          // between tokens in shared memory
    int depth;            // inputs in a tile
    int sums_at, reduce_at, result_at, ring_at;  // offsets in shared memory; x lies at kXAt
    int shared_bytes;
};
constexpr int kMaxWarps = 16;
constexpr int kStages = 4;  // of a warp's ring
// Shared memory starts with the norm's sums [8 tokens][warps] and the rings' barriers.
constexpr int kBarriersAt = 8 * kMaxWarps * 4;
constexpr int kXAt = kBarriersAt + kMaxWarps * kStages * 8;

__device__ __forceinline__ uint4 load_shared_16(uint32_t address) {
    uint4 v;
    asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(address));
    return v;
}
__device__ __forceinline__ uint2 load_shared_8(uint32_t address) {
    uint2 v;
    asm volatile("ld.shared.v2.u32 {%0,%1}, [%2];" : "=r"(v.x), "=r"(v.y) : "r"(address));
    return v;
}
__device__ __forceinline__ uint32_t load_shared_4(uint32_t address) {
    uint32_t v;
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(v) : "r"(address));
    return v;
}
__device__ __forceinline__ uint32_t load_shared_2(uint32_t address) {
    uint16_t v;
    asm volatile("ld.shared.u16 %0, [%1];" : "=h"(v) : "r"(address));
    return v;
}

template <typename T>
__device__ __forceinline__ float2 to_floats(uint32_t pair);
template <>
__device__ __forceinline__ float2 to_floats<__half>(uint32_t pair) {
    return __half22float2(*reinterpret_cast<const __half2*>(&pair));
}
template <>
__device__ __forceinline__ float2 to_floats<__nv_bfloat16>(uint32_t pair) {
    return {__uint_as_float(pair << 16), __uint_as_float(pair & 0xFFFF0000u)};
}
template <typename T>
__device__ __forceinline__ uint32_t to_pair(float low, float high);
template <>
__device__ __forceinline__ uint32_t to_pair<__half>(float low, float high) {
    const __half2 v = __floats2half2_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&v);
}
template <>
__device__ __forceinline__ uint32_t to_pair<__nv_bfloat16>(float low, float high) {
    const __nv_bfloat162 v = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&v);
}

// ---- one tile -----------------------------------------------------------------------------------------------------

// A lane's 16 bytes of x: two k16 steps for its token (see stage_x).
template <typename T>
__device__ __forceinline__ void two_steps(float (&d)[4], const uint32_t (&a)[8], const uint4& b) {
    const uint32_t first[4] = {a[0], a[1], a[2], a[3]};
    const uint32_t second[4] = {a[4], a[5], a[6], a[7]};
    ptx::mma_16816<T>(d, first, b.x, b.y);
    ptx::mma_16816<T>(d, second, b.z, b.w);
}

// acc[0], acc[1]: row lane / 4, tokens 2c and 2c + 1; acc[2], acc[3]: row lane / 4 + 8.
template <typename T, int Group>
__device__ __forceinline__ void add_int4_tile(float (&acc)[4], uint32_t tile, uint32_t x, uint32_t sums, int lane,
                                              bool has_zero) {
    constexpr int kGroups = 128 / Group;
    const uint4 low = load_shared_16(tile + lane * 16);
    const uint4 high = load_shared_16(tile + 512 + lane * 16);
    const uint32_t scales_at = tile + kTileWeightBytes + (lane / 4) * (4 * kGroups);
    const uint32_t zeros_at = tile + kTileWeightBytes + 32 * kGroups + (lane / 4) * (2 * kGroups);
    uint32_t scales[kGroups], zeros[kGroups];
    if constexpr (kGroups == 1) {
        scales[0] = load_shared_4(scales_at);
        zeros[0] = has_zero ? load_shared_2(zeros_at) : 0x0808u;
    } else if constexpr (kGroups == 2) {
        const uint2 s = load_shared_8(scales_at);
        scales[0] = s.x, scales[1] = s.y;
        const uint32_t z = has_zero ? load_shared_4(zeros_at) : 0x08080808u;
        zeros[0] = z, zeros[1] = z >> 16;
    } else {
        const uint4 s = load_shared_16(scales_at);
        scales[0] = s.x, scales[1] = s.y, scales[2] = s.z, scales[3] = s.w;
        const uint2 z = has_zero ? load_shared_8(zeros_at) : make_uint2(0x08080808u, 0x08080808u);
        zeros[0] = z.x, zeros[1] = z.x >> 16, zeros[2] = z.y, zeros[3] = z.y >> 16;
    }
    const uint32_t words[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
    float d[4];
#pragma unroll
    for (int t = 0; t < 4; ++t) {
        if (t % (Group / 32) == 0) d[0] = d[1] = d[2] = d[3] = 0.0f;
        const uint32_t w = words[t], u = words[4 + t];
        const uint32_t a[8] = {int4_pair<T, 0>(w), int4_pair<T, 0>(u), int4_pair<T, 1>(w), int4_pair<T, 1>(u),
                               int4_pair<T, 2>(w), int4_pair<T, 2>(u), int4_pair<T, 3>(w), int4_pair<T, 3>(u)};
        two_steps<T>(d, a, load_shared_16(x + t * 64));
        if ((t + 1) % (Group / 32) == 0) {
            // sum of (v - zero) x = kScale * d - (kOffset + zero) * sum of x
            const int g = t / (Group / 32);
            const float2 scale = __half22float2(*reinterpret_cast<const __half2*>(&scales[g]));
            const uint2 sum = load_shared_8(sums + g * 32);
            constexpr float kMagic = 8388608.0f;  // 2^23: a byte below it in the mantissa is that whole number
            const float zero0 = __uint_as_float(__byte_perm(zeros[g], 0x4B000000, 0x7650)) -
                                (kMagic - Int4Pair<T>::kOffset);
            const float zero1 = __uint_as_float(__byte_perm(zeros[g], 0x4B000000, 0x7651)) -
                                (kMagic - Int4Pair<T>::kOffset);
            const float off0 = -scale.x * zero0, off1 = -scale.y * zero1;
            const float s0 = scale.x * Int4Pair<T>::kScale, s1 = scale.y * Int4Pair<T>::kScale;
            acc[0] = fmaf(s0, d[0], fmaf(off0, __uint_as_float(sum.x), acc[0]));
            acc[1] = fmaf(s0, d[1], fmaf(off0, __uint_as_float(sum.y), acc[1]));
            acc[2] = fmaf(s1, d[2], fmaf(off1, __uint_as_float(sum.x), acc[2]));
            acc[3] = fmaf(s1, d[3], fmaf(off1, __uint_as_float(sum.y), acc[3]));
        }
    }
}

template <typename T, Kind K>
__device__ __forceinline__ void add_8bit_tile(float (&acc)[4], uint32_t tile, uint32_t x, int lane) {
    const uint4 low = load_shared_16(tile + lane * 16);
    const uint4 high = load_shared_16(tile + 512 + lane * 16);
    const uint32_t words[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
    for (int t = 0; t < 2; ++t) {
        uint32_t a[8];
#pragma unroll
        for (int s = 0; s < 2; ++s) {
            const uint32_t w = words[2 * t + s], u = words[4 + 2 * t + s];
            a[4 * s + 0] = K == Kind::kInt8 ? int8_pair<T, 0>(w) : fp8_pair<T, 0>(w);
            a[4 * s + 1] = K == Kind::kInt8 ? int8_pair<T, 0>(u) : fp8_pair<T, 0>(u);
            a[4 * s + 2] = K == Kind::kInt8 ? int8_pair<T, 1>(w) : fp8_pair<T, 1>(w);
            a[4 * s + 3] = K == Kind::kInt8 ? int8_pair<T, 1>(u) : fp8_pair<T, 1>(u);
        }
        two_steps<T>(acc, a, load_shared_16(x + t * 64));
    }
}

// A dense tile: 16 rows x 32 inputs, chunk (h, lane) is row 8 h + lane / 4, inputs 8c..8c+7, as they lie.
template <typename T>
__device__ __forceinline__ void add_dense_tile(float (&acc)[4], uint32_t tile, uint32_t x, int lane) {
    const uint4 low = load_shared_16(tile + lane * 16);
    const uint4 high = load_shared_16(tile + 512 + lane * 16);
    const uint32_t a[8] = {low.x, high.x, low.y, high.y, low.z, high.z, low.w, high.w};
    two_steps<T>(acc, a, load_shared_16(x));
}

// ---- activations --------------------------------------------------------------------------------------------------

// Eight activations of a token from input k on, zeros beyond K; `order` leads packed inputs to the model's.
template <typename T>
__device__ __forceinline__ uint4 load_eight(const trtllm_weight_only_gemm_params& p, const void* from, int64_t k,
                                            bool aligned) {
    const T* row = static_cast<const T*>(from);
    if (aligned && k + 8 <= p.k && p.order == nullptr) return *reinterpret_cast<const uint4*>(row + k);
    const int32_t* order = static_cast<const int32_t*>(p.order);
    uint32_t pairs[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        uint32_t pair = 0;
#pragma unroll
        for (int e = 0; e < 2; ++e) {
            const int64_t at = k + 2 * i + e;
            if (at < p.k) {
                const uint32_t bits = reinterpret_cast<const uint16_t*>(row)[order == nullptr ? at : order[at]];
                pair |= bits << (16 * e);
            }
        }
        pairs[i] = pair;
    }
    return {pairs[0], pairs[1], pairs[2], pairs[3]};
}

__device__ __forceinline__ float warp_sum(float v) {
#pragma unroll
    for (int step = 16; step > 0; step /= 2) v += __shfl_xor_sync(0xFFFFFFFFu, v, step);
    return v;
}

template <typename T>
__device__ __forceinline__ float square_sum(const uint4& v) {
    const float2 a = to_floats<T>(v.x), b = to_floats<T>(v.y), c = to_floats<T>(v.z), d = to_floats<T>(v.w);
    return ((a.x * a.x + a.y * a.y) + (b.x * b.x + b.y * b.y)) + ((c.x * c.x + c.y * c.y) + (d.x * d.x + d.y * d.y));
}

// Copies the block's share of K of every token to shared memory, normalised where asked for, as what lanes read: for
// 32 inputs 64 bytes, 16 for each c = lane % 4: dense in order, packed {2c, 2c+1}, {2c+8, 2c+9} of both k16 steps. For
// int4 also the sum of every group. Ends before a barrier.
template <typename T, Kind K, int Group>
__device__ __forceinline__ void stage_x(const trtllm_weight_only_gemm_params& p, const GemvPlan& plan, char* shared,
                                        int first_tile, int tiles) {
    const uintptr_t pointers = reinterpret_cast<uintptr_t>(p.x) | reinterpret_cast<uintptr_t>(p.norm_weight);
    const bool aligned = pointers % 16 == 0 && p.x_stride % 8 == 0;
    const int threads = blockDim.x, thread = threadIdx.x, warps = threads / 32;
    const int chunks = tiles * (plan.depth / 8);  // of 8 inputs
    const int64_t first = int64_t(first_tile) * plan.depth;
    float* partial = reinterpret_cast<float*>(shared);  // [token][warp]
    const T* x = static_cast<const T*>(p.x);
    const int tokens = int(p.m);
    if (p.norm_weight != nullptr) {
        for (int t = 0; t < tokens; ++t) {
            float sum = 0.0f;
            for (int64_t k = thread * 8; k < p.k; k += threads * 8) {
                // the order of summation does not matter for the sum over all of K
                const T* row = x + t * p.x_stride;
                if (aligned && k + 8 <= p.k) {
                    sum += square_sum<T>(*reinterpret_cast<const uint4*>(row + k));
                } else {
                    for (int64_t i = k; i < p.k && i < k + 8; ++i) sum += float(row[i]) * float(row[i]);
                }
            }
            sum = warp_sum(sum);
            if (thread % 32 == 0) partial[t * kMaxWarps + thread / 32] = sum;
        }
        __syncthreads();
    }
    const int total = tokens * chunks;
    for (int base = thread & ~31; base < total; base += threads) {
        const int index = base + thread % 32;
        const bool inside = index < total;
        const int token = inside ? index / chunks : 0;
        const int chunk = inside ? index - token * chunks : 0;
        const int64_t k = first + chunk * 8;
        uint4 v = make_uint4(0, 0, 0, 0);
        if (inside) v = load_eight<T>(p, x + token * p.x_stride, k, aligned);
        if (p.norm_weight != nullptr) {
            float squares = 0.0f;
            for (int w = 0; w < warps; ++w) squares += partial[token * kMaxWarps + w];
            const float scale = rsqrtf(squares / float(p.k) + p.norm_eps);
            const uint4 weight = inside ? load_eight<T>(p, p.norm_weight, k, aligned) : make_uint4(0, 0, 0, 0);
            const auto norm = [&](uint32_t value, uint32_t by) {
                const float2 a = to_floats<T>(value), b = to_floats<T>(by);
                return to_pair<T>(a.x * scale * (p.norm_offset + b.x), a.y * scale * (p.norm_offset + b.y));
            };
            v = {norm(v.x, weight.x), norm(v.y, weight.y), norm(v.z, weight.z), norm(v.w, weight.w)};
        }
        if (inside) {
            char* to = shared + kXAt + token * plan.x_bytes + (chunk / 4) * 64;
            if constexpr (K == Kind::kDense) {
                *reinterpret_cast<uint4*>(to + (chunk % 4) * 16) = v;
            } else {
                uint32_t* words = reinterpret_cast<uint32_t*>(to) + chunk % 4;
                words[0] = v.x, words[4] = v.y, words[8] = v.z, words[12] = v.w;
            }
        }
        if constexpr (K == Kind::kInt4) {
            const float2 a = to_floats<T>(v.x), b = to_floats<T>(v.y), c = to_floats<T>(v.z), d = to_floats<T>(v.w);
            float sum = ((a.x + a.y) + (b.x + b.y)) + ((c.x + c.y) + (d.x + d.y));
#pragma unroll
            for (int step = 1; step < Group / 8; step *= 2) sum += __shfl_xor_sync(0xFFFFFFFFu, sum, step);
            if (inside && chunk % (Group / 8) == 0) {
                reinterpret_cast<float*>(shared + plan.sums_at)[(chunk / (Group / 8)) * 8 + token] = sum;
            }
        }
    }
}

// ---- epilogue -----------------------------------------------------------------------------------------------------

__device__ __forceinline__ float activate(float x, int gate) {
    if (gate == 1) return x / (1.0f + __expf(-x));
    if (gate == 2) return 0.5f * x * (1.0f + erff(x * 0.70710678118654752f));
    return 0.5f * x * (1.0f + tanhf(0.79788456080286536f * (x + 0.044715f * x * x * x)));
}

// What one output takes from global memory besides its sum: asked for before the products, used after them.
struct Extra {
    float factor, bias, residual;
};

// Row `row` of 16 of a stripe and a token; zeros where there is no such output.
template <typename T, Kind K>
__device__ __forceinline__ Extra extra_of(const trtllm_weight_only_gemm_params& p, int stripe, int token, int row) {
    Extra extra{p.weight_multiplier, 0.0f, 0.0f};
    const int64_t n = int64_t(stripe) * kStripeRows + row;
    if (token >= p.m || n >= p.n) return extra;
    if constexpr (K == Kind::kInt8 || K == Kind::kFp8) extra.factor *= static_cast<const float*>(p.scale)[n];
    if constexpr (K == Kind::kFp8) extra.factor *= kFp8Scale<T>;
    if (p.bias != nullptr) extra.bias = float(static_cast<const T*>(p.bias)[n]);
    if (p.residual != nullptr && (p.gate == 0 || row < 8)) {
        const int64_t column = p.gate == 0 ? n : int64_t(stripe) * 8 + row;
        extra.residual = float(static_cast<const T*>(p.residual)[token * p.residual_stride + column]);
    }
    return extra;
}

// One sum to one output. A half warp holds the 16 rows of a stripe for one token (all lanes must call).
template <typename T, Kind K>
__device__ __forceinline__ void finish(const trtllm_weight_only_gemm_params& p, float v, const Extra& extra, int stripe,
                                       int token, int row) {
    const int64_t n = int64_t(stripe) * kStripeRows + row;
    int64_t column = n;
    bool valid = n < p.n && token < p.m;
    v = K == Kind::kDense ? v + extra.bias : fmaf(v, extra.factor, extra.bias);
    if (p.gate != 0) {
        const float up = __shfl_down_sync(0xFFFFFFFFu, v, 8);
        v = activate(v, p.gate) * up;
        column = int64_t(stripe) * 8 + row;
        valid = valid && row < 8;
    }
    if (valid) static_cast<T*>(p.out)[token * p.out_stride + column] = T(v + extra.residual);
}

// ---- kernel -------------------------------------------------------------------------------------------------------

__device__ __forceinline__ uint32_t cluster_rank() {
    uint32_t r = 0;
#if __CUDA_ARCH__ >= 900
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(r));
#endif
    return r;
}
__device__ __forceinline__ void cluster_sync() {
#if __CUDA_ARCH__ >= 900
    asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}
__device__ __forceinline__ float load_remote(uint32_t address, uint32_t rank) {
    float v = 0.0f;
#if __CUDA_ARCH__ >= 900
    asm volatile("{\n.reg .b32 there;\nmapa.shared::cluster.u32 there, %1, %2;\nld.shared::cluster.f32 %0, [there];\n}"
                 : "=f"(v)
                 : "r"(address), "r"(rank)
                 : "memory");
#endif
    return v;
}

template <typename T, Kind K, int Group>
__global__ void __launch_bounds__(kMaxWarps * 32, 1)
    gemv_kernel(const __grid_constant__ trtllm_weight_only_gemm_params p, const __grid_constant__ GemvPlan plan) {
    extern __shared__ __align__(128) char shared[];
    constexpr bool kBulk = K != Kind::kDense;  // one contiguous run a stage
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int slice = warp % plan.slices, group = warp / plan.slices;
    const int rank = plan.cluster > 1 ? int(cluster_rank()) : 0;
    const int block = plan.cluster > 1 ? int(blockIdx.x) / plan.cluster : int(blockIdx.x);
    const int slices = plan.cluster * plan.slices;
    // tiles of this block and of this warp
    const int block_first = rank * plan.slices * plan.tiles / slices;
    const int block_end = (rank + 1) * plan.slices * plan.tiles / slices;
    const int my = rank * plan.slices + slice;
    const int first = my * plan.tiles / slices, end = (my + 1) * plan.tiles / slices;

    const int stage_bytes = plan.stage_tiles * plan.tile_bytes;
    char* ring = shared + plan.ring_at + warp * kStages * stage_bytes;
    const uint32_t ring_address = ptx::shared_address(ring);
    [[maybe_unused]] uint64_t* barriers = reinterpret_cast<uint64_t*>(shared + kBarriersAt) + warp * kStages;

    // ---- the next stage to ask for ----
    int ask_round = 0, ask_tile = first, ask_stage = 0;
    const auto stripe_of = [&](int round) { return (round * plan.grid + block) * plan.groups + group; };
    const auto ask = [&]() {
        const int stripe = stripe_of(ask_round);
        const bool any = ask_round < plan.rounds && stripe < plan.stripes && first < end;
        if (any) {
            const int count = min(plan.stage_tiles, end - ask_tile);
            char* to = ring + ask_stage * stage_bytes;
            if constexpr (kBulk) {
                const char* from = static_cast<const char*>(p.weight) +
                                   (int64_t(stripe) * plan.tiles + ask_tile) * plan.tile_bytes;
                const int bytes = count * plan.tile_bytes;
#if __CUDA_ARCH__ >= 900
                if (lane == 0) {
                    ptx::barrier_expect(&barriers[ask_stage], bytes);
                    ptx::copy_bulk(to, from, bytes, &barriers[ask_stage]);
                }
#else
                for (int at = lane * 16; at < bytes; at += 512) ptx::copy_async_16(to + at, from + at);
#endif
            } else {
                const int64_t low = min(int64_t(stripe) * kStripeRows + lane / 4, p.n - 1);
                const int64_t high = min(int64_t(stripe) * kStripeRows + 8 + lane / 4, p.n - 1);
                const T* weight = static_cast<const T*>(p.weight);
                for (int i = 0; i < count; ++i) {
                    const int64_t k = int64_t(ask_tile + i) * 32 + 8 * (lane % 4);
                    const uint32_t bytes = k < p.k ? 16 : 0;
                    const int64_t at = k < p.k ? k : 0;
                    ptx::copy_async_16(to + i * 1024 + lane * 16, weight + low * p.weight_stride + at, bytes);
                    ptx::copy_async_16(to + i * 1024 + 512 + lane * 16, weight + high * p.weight_stride + at, bytes);
                }
            }
            ask_tile += count;
            if (ask_tile >= end) ask_tile = first, ++ask_round;
            if (++ask_stage == kStages) ask_stage = 0;
        }
#if __CUDA_ARCH__ >= 900
        if constexpr (!kBulk) ptx::copy_async_commit();
#else
        ptx::copy_async_commit();
#endif
    };

#if __CUDA_ARCH__ >= 900
    if constexpr (kBulk) {
        if (lane == 0) {
            for (int s = 0; s < kStages; ++s) ptx::barrier_init(&barriers[s], 1);
            ptx::barrier_init_fence();
            ptx::fence_async_shared();
        }
        __syncwarp();
    }
#endif
    for (int s = 0; s < kStages; ++s) ask();
    if (p.pdl) {
        ptx::let_next_kernel_start();
        ptx::wait_for_previous_kernel();
    }
    stage_x<T, K, Group>(p, plan, shared, block_first, block_end - block_first);
    __syncthreads();

    const int tokens = int(p.m);
    const uint32_t x = ptx::shared_address(shared + kXAt) + min(lane / 4, tokens - 1) * plan.x_bytes + (lane % 4) * 16;
    const uint32_t sums = ptx::shared_address(shared + plan.sums_at) + (lane % 4) * 8;
    float* reduce = reinterpret_cast<float*>(shared + plan.reduce_at);  // [2][warp][token][16]
    float* result = reinterpret_cast<float*>(shared + plan.result_at);  // [round][group][token][16], clusters only
    int stage = 0;
    uint32_t parity = 0;
    // the output this thread finishes first in every round: unit (a stripe of the block's), token and row of 16
    const int each = tokens * 16;
    const int my_unit = int(threadIdx.x) / each, my_token = (int(threadIdx.x) - my_unit * each) / 16;
    const int my_row = threadIdx.x % 16;
    for (int round = 0; round < plan.rounds; ++round) {
        const int stripe = stripe_of(round);
        const int first_stripe = (round * plan.grid + block) * plan.groups;
        Extra early{};
        if (plan.cluster == 1 && my_unit < plan.groups) {
            early = extra_of<T, K>(p, first_stripe + my_unit, my_token, my_row);
        }
        float acc[4] = {};
        if (stripe < plan.stripes) {
            for (int tile = first; tile < end; tile += plan.stage_tiles) {
                const int count = min(plan.stage_tiles, end - tile);
#if __CUDA_ARCH__ >= 900
                if constexpr (kBulk) {
                    ptx::barrier_wait(&barriers[stage], parity);
                } else {
                    ptx::copy_async_wait<kStages - 1>();
                    __syncwarp();
                }
#else
                ptx::copy_async_wait<kStages - 1>();
                __syncwarp();
#endif
                uint32_t at = ring_address + stage * stage_bytes;
                for (int i = 0; i < count; ++i, at += plan.tile_bytes) {
                    const int here = tile + i - block_first;
                    const uint32_t tile_x = x + here * plan.depth * 2;
                    if constexpr (K == Kind::kInt4) {
                        add_int4_tile<T, Group>(acc, at, tile_x, sums + here * (128 / Group) * 32, lane, p.has_zero);
                    } else if constexpr (K == Kind::kDense) {
                        add_dense_tile<T>(acc, at, tile_x, lane);
                    } else {
                        add_8bit_tile<T, K>(acc, at, tile_x, lane);
                    }
                }
                __syncwarp();  // every lane has read the stage
                ask();
                if (++stage == kStages) stage = 0, parity ^= 1;
            }
        }
        // ---- the block's slices in order ----
        float* mine = reduce + ((round & 1) * plan.warps + warp) * each;
        const int token = 2 * (lane % 4), row = lane / 4;
        if (token < tokens) mine[token * 16 + row] = acc[0], mine[token * 16 + row + 8] = acc[2];
        if (token + 1 < tokens) mine[token * 16 + 16 + row] = acc[1], mine[token * 16 + 24 + row] = acc[3];
        __syncthreads();
        const float* all = reduce + (round & 1) * plan.warps * each;
        for (int base = int(threadIdx.x) & ~31; base < plan.groups * each; base += int(blockDim.x)) {
            const int index = base + lane;
            const int unit = index / each, within = index - unit * each;
            float v = 0.0f;
            if (unit < plan.groups) {
                for (int s = 0; s < plan.slices; ++s) v += all[(unit * plan.slices + s) * each + within];
            }
            if (plan.cluster > 1) {
                if (unit < plan.groups) result[round * plan.groups * each + index] = v;
                continue;
            }
            // past the last unit there is no output: token m says so
            const int of = unit < plan.groups ? within / 16 : tokens;
            if (base >= int(blockDim.x)) early = extra_of<T, K>(p, first_stripe + unit, of, within % 16);
            finish<T, K>(p, v, early, first_stripe + unit, of, within % 16);
        }
    }
    if (plan.cluster > 1) {
        // ---- the cluster's blocks in order; each finishes its share of the outputs ----
        cluster_sync();
        const int total = plan.rounds * plan.groups * each;
        const int step = int(blockDim.x) * plan.cluster;
        for (int base = rank * int(blockDim.x) + (int(threadIdx.x) & ~31); base < total; base += step) {
            const int index = base + lane;
            const int unit = index / each, within = index - unit * each;
            const int stripe = ((unit / plan.groups) * plan.grid + block) * plan.groups + unit % plan.groups;
            const int of = index < total ? within / 16 : tokens;
            const Extra extra = extra_of<T, K>(p, stripe, of, within % 16);
            float v = 0.0f;
            if (index < total) {
                const uint32_t at = ptx::shared_address(result + index);
                for (int r = 0; r < plan.cluster; ++r) v += load_remote(at, r);
            }
            finish<T, K>(p, v, extra, stripe, of, within % 16);
        }
        cluster_sync();  // nobody leaves while its sums are read
    }
}

}  // namespace trtllm::weight_only
