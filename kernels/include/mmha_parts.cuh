// How parts of a pair come together: a block's warps, then the blocks that share the pair.
#pragma once

#include "mmha_kernel.cuh"

namespace trtllm::mmha {

// Scratch memory holds two parts a block: of a pair that goes on behind its run (part 2 i + 1), and of one that ends in
// it but began before (part 2 i). Between launches all of it is zero. A part has no zero in it (they change their sign),
// so that each of its words says itself that it has come: no counter, no fence, and one trip through the L2 cache
// between two blocks. Whoever reads a part makes it zero again. (Lamport's single-writer registers, as in the one-shot
// reductions of collective libraries.)
//
// The block that has a pair's last run waits for the others, all of which have lower numbers. GPUs start blocks in the
// order of their numbers, and no block waits before it has left all parts that others need: so whoever is waited for
// runs, and needs nobody.
__device__ __forceinline__ float never_zero(float x) { return x == 0.0f ? -0.0f : x; }
__device__ __forceinline__ bool has_come(float x) { return __float_as_uint(x) != 0; }

__device__ __forceinline__ void publish(float* to, float4 x) {
    asm volatile("st.relaxed.gpu.global.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(to), "f"(never_zero(x.x)),
                 "f"(never_zero(x.y)), "f"(never_zero(x.z)), "f"(never_zero(x.w))
                 : "memory");
}
__device__ __forceinline__ void publish(float* to, float2 x) {
    asm volatile("st.relaxed.gpu.global.v2.f32 [%0], {%1, %2};" ::"l"(to), "f"(never_zero(x.x)), "f"(never_zero(x.y))
                 : "memory");
}
__device__ __forceinline__ float4 peek_four(const float* from) {
    float4 x;
    asm volatile("ld.relaxed.gpu.global.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(x.x), "=f"(x.y), "=f"(x.z), "=f"(x.w)
                 : "l"(from)
                 : "memory");
    return x;
}
__device__ __forceinline__ float2 peek_two(const float* from) {
    float2 x;
    asm volatile("ld.relaxed.gpu.global.v2.f32 {%0, %1}, [%2];" : "=f"(x.x), "=f"(x.y) : "l"(from) : "memory");
    return x;
}

// What a block puts together when its run is done: a pair that ends in the run but began before.
struct Owed {
    Job job;
    int first, count;  // blocks that have parts of it
};
static_assert(sizeof(Owed) <= kOwedBytes);

// What becomes of the sums of a block's warps.
template <typename C, int D, int NT>
struct Parts {
    using S = Shape<C, D, NT>;

    const trtllm_mmha_params& p;
    const int group, rows;  // query heads a kv head; query rows a pair
    const bool bfloat16;

    __device__ __forceinline__ explicit Parts(const trtllm_mmha_params& params)
        : p(params),
          group(params.heads / params.kv_heads),
          rows(params.heads / params.kv_heads * params.q_length),
          bfloat16(params.dtype == TRTLLM_BFLOAT16) {}

    // zeros for a sequence without keys
    __device__ __forceinline__ void clear(int b) const {
        const int vectors = p.q_length * p.heads * (D / 8);
        for (int i = threadIdx.x; i < vectors; i += S::kThreads) {
            const int row = i / (D / 8), token = row / p.heads, head = row % p.heads;
            *reinterpret_cast<uint4*>(out_row(b, token, head) + i % (D / 8) * 8) = make_uint4(0, 0, 0, 0);
        }
    }
    __device__ __forceinline__ uint16_t* out_row(int b, int token, int head) const {
        return static_cast<uint16_t*>(p.out) + b * p.out_batch_stride + token * p.out_token_stride +
               head * p.out_head_stride;
    }

    __device__ __forceinline__ float* part_of(int block, bool goes_on) const {
        return static_cast<float*>(p.workspace) + (2 * int64_t(block) + goes_on) * S::kPartFloats;
    }

    // The warps' sums put together in `sums` (shared memory): the result where the block has the `whole` pair, or its
    // part of it.
    __device__ __forceinline__ void leave(const Warp<C, D, NT>& mine, float* sums, const Job& job, bool whole,
                                          bool goes_on) const {
        ptx::copy_async_wait<0>();
        const float by = scale_of(job);
        __syncthreads();  // nobody reads the buffers any more
        float2* const statistics = reinterpret_cast<float2*>(sums + S::kWarps * S::kRows * S::kSumPitch);
        mine.leave(sums, statistics);
        __syncthreads();

        const int here = min(S::kRows, rows - job.row);
        float* const part = part_of(blockIdx.x, goes_on);
        for (int i = threadIdx.x; i < here * (D / 4); i += S::kThreads) {
            const int r = i / (D / 4), column = i % (D / 4) * 4;
            float most = -INFINITY;
#pragma unroll
            for (int w = 0; w < S::kWarps; ++w) most = fmaxf(most, statistics[w * S::kRows + r].x);
            float all = 0.0f;
            float4 total{};
#pragma unroll
            for (int w = 0; w < S::kWarps; ++w) {
                const float2 one = statistics[w * S::kRows + r];
                const float weight = one.x == -INFINITY ? 0.0f : exp2_approx(one.x - most);
                const float4 x = *reinterpret_cast<const float4*>(sums + (w * S::kRows + r) * S::kSumPitch + column);
                all += one.y * weight;
                total.x += x.x * weight, total.y += x.y * weight, total.z += x.z * weight, total.w += x.w * weight;
            }
            if (whole) {
                store(job, r, column, total, all > 0.0f ? by / all : 0.0f);
            } else {
                publish(part + r * D + column, total);
                if (column == 0) publish(part + S::kRows * D + 2 * r, make_float2(most, all));
            }
        }
    }

    // The parts of a pair, added in the order of the keys, kAtOnce of them on their way at a time.
    __device__ __forceinline__ void combine(const Owed& what) const {
        constexpr int kAtOnce = S::kResident > 2 ? kPartsAtOnce / 2 : kPartsAtOnce;
        const Job& job = what.job;
        const int first = what.first, count = what.count, here = min(S::kRows, rows - job.row);
        const float by = scale_of(job);
        for (int i = threadIdx.x; i < here * (D / 4); i += S::kThreads) {
            const int r = i / (D / 4), column = i % (D / 4) * 4;
            float most = -INFINITY, all = 0.0f;
            float4 total{};
            for (int from = 0; from < count; from += kAtOnce) {
                float4 x[kAtOnce];
                float2 statistics[kAtOnce];
                bool all_here;
                [[maybe_unused]] int spins = 0;
                do {
                    all_here = true;
#pragma unroll
                    for (int n = 0; n < kAtOnce; ++n) {
                        if (from + n < count) {
                            const float* const part = part_of(first + from + n, from + n + 1 < count);
                            x[n] = peek_four(part + r * D + column);
                            statistics[n] = peek_two(part + S::kRows * D + 2 * r);
                        } else {
                            statistics[n] = make_float2(-INFINITY, -0.0f);
                            x[n] = make_float4(-0.0f, -0.0f, -0.0f, -0.0f);
                        }
                    }
#pragma unroll
                    for (int n = 0; n < kAtOnce; ++n) {
                        all_here &= has_come(x[n].x) && has_come(x[n].y) && has_come(x[n].z) && has_come(x[n].w) &&
                                    has_come(statistics[n].x) && has_come(statistics[n].y);
                    }
#ifdef TRTLLM_DEBUG_SPIN
                    if (++spins > TRTLLM_DEBUG_SPIN) __trap();
#endif
                } while (!all_here);
                for (int n = from; n < min(from + kAtOnce, count); ++n) {
                    *reinterpret_cast<float4*>(part_of(first + n, n + 1 < count) + r * D + column) = float4{};
                }
                float grown = most;
#pragma unroll
                for (int n = 0; n < kAtOnce; ++n) grown = fmaxf(grown, statistics[n].x);
                if (grown == -INFINITY) continue;  // nothing seen yet
                const float shrink = exp2_approx(most - grown);
                most = grown;
                all *= shrink, total.x *= shrink, total.y *= shrink, total.z *= shrink, total.w *= shrink;
#pragma unroll
                for (int n = 0; n < kAtOnce; ++n) {
                    const float weight = exp2_approx(statistics[n].x - most);
                    all += statistics[n].y * weight;
                    total.x += x[n].x * weight, total.y += x[n].y * weight;
                    total.z += x[n].z * weight, total.w += x[n].w * weight;
                }
            }
            store(job, r, column, total, all > 0.0f ? by / all : 0.0f);
        }
        __syncthreads();  // the statistics have been read by all
        for (int i = threadIdx.x; i < here * count; i += S::kThreads) {
            const int r = i / count, n = i - r * count;
            *reinterpret_cast<float2*>(part_of(first + n, n + 1 < count) + S::kRows * D + 2 * r) = float2{};
        }
    }

    // What sums of cached values must be multiplied by.
    __device__ __forceinline__ float scale_of(const Job& job) const {
        return Cached<C>::kBytes == 2 ? 1.0f : p.v_scale[job.kv_head] * Cached<C>::kFactor;
    }
    __device__ __forceinline__ void store(const Job& job, int r, int column, float4 x, float factor) const {
        const int token = (job.row + r) / group, head = job.kv_head * group + (job.row + r) % group;
        const uint2 four =
            make_uint2(narrow(x.x * factor, x.y * factor, bfloat16), narrow(x.z * factor, x.w * factor, bfloat16));
        *reinterpret_cast<uint2*>(out_row(job.sequence, token, head) + column) = four;
    }
};

}  // namespace trtllm::mmha
