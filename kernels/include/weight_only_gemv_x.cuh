// Activations on their way to shared memory, in the form that the tiles' products read.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <type_traits>

#include "ptx.cuh"
#include "weight_only_gemv_plan.hpp"
#include "weight_only_gemv_tiles.cuh"

namespace trtllm::weight_only {

// Whether inputs may be read eight at a time, in order.
__device__ __forceinline__ bool vectors(const trtllm_weight_only_gemm_params& p) {
    const uintptr_t pointers = reinterpret_cast<uintptr_t>(p.x) | reinterpret_cast<uintptr_t>(p.norm_weight);
    return pointers % 16 == 0 && p.x_stride % 8 == 0 && p.k % 8 == 0 && p.order == nullptr;
}

// Eight inputs of a row from k on, zeros beyond K; `order` leads packed inputs to the model's.
__device__ __forceinline__ uint4 load_slowly(const trtllm_weight_only_gemm_params& p, const void* row, int64_t k) {
    const int32_t* order = static_cast<const int32_t*>(p.order);
    uint4 v = make_uint4(0, 0, 0, 0);
#pragma unroll 1
    for (int e = 0; e < 8; ++e, ++k) {
        uint32_t bits = 0;
        if (k < p.k) bits = static_cast<const uint16_t*>(row)[order == nullptr ? k : order[k]];
        v.x = __funnelshift_r(v.x, v.y, 16), v.y = __funnelshift_r(v.y, v.z, 16);
        v.z = __funnelshift_r(v.z, v.w, 16), v.w = v.w >> 16 | bits << 16;
    }
    return v;
}

__device__ __forceinline__ uint4 load_eight(const trtllm_weight_only_gemm_params& p, const void* row, int64_t k) {
    if (!vectors(p)) return load_slowly(p, row, k);
    return k < p.k ? *reinterpret_cast<const uint4*>(static_cast<const uint16_t*>(row) + k) : make_uint4(0, 0, 0, 0);
}

// Which chunks of eight inputs a thread brings: `chunk`, and `across` further until `chunks`, of tokens `token`, and
// `step` further. The threads of a warp have the same token.
struct Share {
    int chunk, chunks, across, token, step;
    int64_t first;  // input

    __device__ __forceinline__ Share(const GemvPlan& plan, int64_t first_input, int chunk_count)
        : chunk(int(threadIdx.x) & ((1 << plan.row_log) - 1)),
          chunks(chunk_count),
          across(1 << plan.row_log),
          token(int(threadIdx.x) >> plan.row_log),
          step(int(blockDim.x) >> plan.row_log),
          first(first_input) {
        if (token >= step) token = 8;  // a rest of the threads brings nothing
    }
};

// Into L2, before the kernel that writes them has ended: a hint that reads nothing, and changes nothing where that
// kernel has just written them. What lies in device memory is fetched while the time for it does not count.
template <typename T>
__device__ __forceinline__ void prefetch_x(const trtllm_weight_only_gemm_params& p, const Share& mine, int tokens) {
#if __CUDA_ARCH__ >= 900
    if (mine.chunk % 8 != 0 || p.order != nullptr) return;  // lines of 128 bytes
#pragma unroll 1
    for (int token = mine.token; token < tokens; token += mine.step) {
#pragma unroll 1
        for (int chunk = mine.chunk; chunk < mine.chunks; chunk += mine.across) {
            const int64_t k = mine.first + 8 * chunk;
            if (k >= p.k) break;
            asm volatile("prefetch.global.L2 [%0];" ::"l"(static_cast<const T*>(p.x) + token * p.x_stride + k));
        }
    }
#endif
}

// As they are.
template <typename T>
__device__ __forceinline__ void copy_x(const trtllm_weight_only_gemm_params& p, const GemvPlan& plan, const Share& mine,
                                       char* x, int tokens) {
    if (vectors(p)) {
        // several at once: of the inputs where one round of the threads does not take them all, else of the tokens
        constexpr int kAtOnce = 4;
        const bool deep = mine.chunks > mine.across;
        const int next_token = deep ? 0 : mine.step, next_chunk = deep ? mine.across : 0;
#pragma unroll 1
        for (int t = mine.token; t < tokens; t += deep ? mine.step : kAtOnce * mine.step) {
#pragma unroll 1
            for (int c = mine.chunk; c < mine.chunks; c += deep ? kAtOnce * mine.across : mine.across) {
                uint4 v[kAtOnce];
#pragma unroll
                for (int i = 0; i < kAtOnce; ++i) {
                    const int token = t + i * next_token, chunk = c + i * next_chunk;
                    const int64_t k = mine.first + 8 * chunk;
                    v[i] = make_uint4(0, 0, 0, 0);
                    if (token < tokens && chunk < mine.chunks && k < p.k) {
                        v[i] = *reinterpret_cast<const uint4*>(static_cast<const T*>(p.x) + token * p.x_stride + k);
                    }
                }
#pragma unroll
                for (int i = 0; i < kAtOnce; ++i) {
                    const int token = t + i * next_token, chunk = c + i * next_chunk;
                    if (token < tokens && chunk < mine.chunks) {
                        *reinterpret_cast<uint4*>(x + token * plan.x_bytes + chunk * 16) = v[i];
                    }
                }
            }
        }
        return;
    }
#pragma unroll 1
    for (int token = mine.token; token < tokens; token += mine.step) {
#pragma unroll 1
        for (int chunk = mine.chunk; chunk < mine.chunks; chunk += mine.across) {
            const T* row = static_cast<const T*>(p.x) + token * p.x_stride;
            *reinterpret_cast<uint4*>(x + token * plan.x_bytes + chunk * 16) =
                load_slowly(p, row, mine.first + 8 * chunk);
        }
    }
}

// The sums of squares of the tokens, `partial` [8 tokens][kGemvWarps], one for each warp that brings the token.
template <typename T>
__device__ __forceinline__ void sum_squares(const trtllm_weight_only_gemm_params& p, const GemvPlan& plan,
                                            const Share& mine, const char* x, float* partial, int tokens, int lane) {
#pragma unroll 1
    for (int token = mine.token; token < tokens; token += mine.step) {
        float sum = 0.0f;
        if (plan.cluster_log == 0) {
#pragma unroll 1
            for (int chunk = mine.chunk; chunk < mine.chunks; chunk += mine.across) {
                sum += square_sum<T>(*reinterpret_cast<const uint4*>(x + token * plan.x_bytes + chunk * 16));
            }
        } else {
            // the block has but a part of K
            const T* row = static_cast<const T*>(p.x) + token * p.x_stride;
#pragma unroll 4
            for (int64_t k = mine.chunk; k < p.k; k += mine.across) sum += float(row[k]) * float(row[k]);
        }
        sum = warp_sum(sum);
        if (lane == 0) partial[token * kGemvWarps + mine.chunk / 32] = sum;
    }
}


// x * scale * (offset + weight), rounded to T.
template <typename T>
__device__ __forceinline__ uint32_t normalised(uint32_t value, uint32_t weight, float scale, float offset) {
    const float2 a = to_floats<T>(value), b = to_floats<T>(weight);
    return to_pair<T>(a.x * scale * (offset + b.x), a.y * scale * (offset + b.y));
}

// Eight inputs of a token (every lane of a warp has others of the same one) as the products take them; writes the
// records. Scaled, they are float16 numbers below 2^15: a power of two times what they are, a tile and token having
// one, int4's odd chunks another 2^-4. Exact for values down to 2^-28 of the largest (bfloat16 has 8 bits, the last bit
// of a float16 subnormal is 2^-24), and wrong by at most 2^-35 of that below: 2^-11 of what a float32 sum rounds.
template <typename T, Kind K, int Group, bool Scaled>
__device__ __forceinline__ uint4 prepared(uint4 v, float* records, int chunk, int token, bool inside) {
    constexpr int kLanes = kDepth<K> / 8;  // that hold a tile's inputs
    constexpr int kSummed = K == Kind::kInt4 ? Group / 8 : kLanes;
    if constexpr (kRecords<K, Group, Scaled> > 0) {
        float* const record = records + unsigned(chunk) / kLanes * (kRecords<K, Group, Scaled> * 8) + token;
        const float2 f[4] = {to_floats<T>(v.x), to_floats<T>(v.y), to_floats<T>(v.z), to_floats<T>(v.w)};
        float all = 1.0f;
        if constexpr (Scaled) {
            using Pair = std::conditional_t<std::is_same_v<T, __half>, __half2, __nv_bfloat162>;
            const auto larger = [](uint32_t a, uint32_t b) {
                const Pair c =
                    __hmax2(__habs2(reinterpret_cast<const Pair&>(a)), __habs2(reinterpret_cast<const Pair&>(b)));
                return reinterpret_cast<const uint32_t&>(c);
            };
            const float2 two = to_floats<T>(larger(larger(v.x, v.y), larger(v.z, v.w)));
            uint32_t most = __float_as_uint(fmaxf(two.x, two.y));
#pragma unroll
            for (int step = 1; step < kLanes; step *= 2) most = max(most, __shfl_xor_sync(0xFFFFFFFFu, most, step));
            // 2^14 <= largest * 2^up < 2^15
            const int up = min(max(141 - int(most >> 23), -113), 126);
            all = __uint_as_float(uint32_t(127 + up) << 23);
            const float scale = K == Kind::kInt4 && chunk % 2 == 1 ? all * 0.0625f : all;
            v.x = to_pair<__half>(f[0].x * scale, f[0].y * scale);
            v.y = to_pair<__half>(f[1].x * scale, f[1].y * scale);
            v.z = to_pair<__half>(f[2].x * scale, f[2].y * scale);
            v.w = to_pair<__half>(f[3].x * scale, f[3].y * scale);
            if (inside && chunk % kLanes == 0) {
                record[(kRecords<K, Group, Scaled> - 1) * 8] = __uint_as_float(uint32_t(127 - up) << 23);
            }
        }
        if constexpr (K != Kind::kFp8) {
            float sum = ((f[0].x + f[0].y) + (f[1].x + f[1].y)) + ((f[2].x + f[2].y) + (f[3].x + f[3].y));
            sum *= all;
#pragma unroll
            for (int step = 1; step < kSummed; step *= 2) sum += __shfl_xor_sync(0xFFFFFFFFu, sum, step);
            if (inside && chunk % kSummed == 0) {
                record[unsigned(chunk) % kLanes / kSummed * 8] = sum * kStart<T, K, Scaled>;
            }
        }
    }
    return v;
}

// What copy_x left: normalised where asked for, and prepared.
template <typename T, Kind K, int Group, bool Scaled>
__device__ __forceinline__ void convert_x(const trtllm_weight_only_gemm_params& p, const GemvPlan& plan,
                                          const Share& mine, char* x, float* records, const float* partial,
                                          const uint4& first_weight, int tokens, int lane) {
    if (kRecords<K, Group, Scaled> == 0 && p.norm_weight == nullptr) return;
#pragma unroll 1
    for (int token = mine.token; token < tokens; token += mine.step) {
        float norm = 1.0f;
        if (p.norm_weight != nullptr) {
            float sum = 0.0f;
#pragma unroll 1
            for (int w = 0; w < mine.across / 32; ++w) sum += partial[token * kGemvWarps + w];
            norm = rsqrtf(sum * plan.inverse_k + p.norm_eps);
        }
#pragma unroll 1
        for (int chunk = mine.chunk; chunk - lane < mine.chunks; chunk += mine.across) {
            const bool inside = chunk < mine.chunks;
            uint4* const at = reinterpret_cast<uint4*>(x + token * plan.x_bytes + chunk * 16);
            uint4 v = inside ? *at : make_uint4(0, 0, 0, 0);
            if (p.norm_weight != nullptr) {
                uint4 weight = first_weight;
                if (chunk != mine.chunk && inside) weight = load_eight(p, p.norm_weight, mine.first + 8 * chunk);
                v.x = normalised<T>(v.x, weight.x, norm, p.norm_offset);
                v.y = normalised<T>(v.y, weight.y, norm, p.norm_offset);
                v.z = normalised<T>(v.z, weight.z, norm, p.norm_offset);
                v.w = normalised<T>(v.w, weight.w, norm, p.norm_offset);
            }
            v = prepared<T, K, Group, Scaled>(v, records, chunk, token, inside);
            if (inside) *at = v;
        }
    }
}

// The shortest way, for one token without a norm of which a thread has no more than one chunk.
template <typename T, Kind K, int Group, bool Scaled>
__device__ __forceinline__ void bring_one(const trtllm_weight_only_gemm_params& p, const Share& mine, char* x,
                                          float* records) {
    const bool inside = mine.chunk < mine.chunks;
    uint4 v = make_uint4(0, 0, 0, 0);
    if (inside) v = load_eight(p, p.x, mine.first + 8 * mine.chunk);
    v = prepared<T, K, Group, Scaled>(v, records, mine.chunk, 0, inside);
    if (inside) *reinterpret_cast<uint4*>(x + mine.chunk * 16) = v;
}

}  // namespace trtllm::weight_only
