// The grid of generation attention: each block's run of work, and how parts of a pair come together.
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

template <typename C, int D, int NT>
class Block {
    using S = Shape<C, D, NT>;
    using Math = typename Cached<C>::Math;

    const trtllm_mmha_params& p;
    unsigned char* const shared;
    const int stages;
    Math* const queries;         // [kRows][kQueryPitch]
    unsigned char* const k_new;  // [D] of C, and [D] of C behind it
    float* const factors;        // [kRows]
    Owed* const owed;
    Warp<C, D, NT> mine;
    const int group, rows;       // query heads a kv head; query rows a pair
    const bool bfloat16;
    bool waited = false;

  public:
    __device__ __forceinline__ Block(const trtllm_mmha_params& params, unsigned char* memory, int stage_count)
        : p(params),
          shared(memory + S::kFixedBytes),
          stages(stage_count),
          queries(reinterpret_cast<Math*>(memory)),
          k_new(memory + S::kQueryBytes),
          factors(reinterpret_cast<float*>(memory + S::kQueryBytes + 2 * S::kRowBytes)),
          owed(reinterpret_cast<Owed*>(factors + S::kRows)),
          mine(params, memory + S::kFixedBytes, stage_count),
          group(params.heads / params.kv_heads),
          rows(params.heads / params.kv_heads * params.q_length),
          bfloat16(params.dtype == TRTLLM_BFLOAT16) {}

    __device__ __forceinline__ void wait() {
        if (waited) return;
        waited = true;
        ptx::wait_for_previous_kernel();
        ptx::let_next_kernel_start();
    }

    __device__ __forceinline__ void run() {
        if (p.pdl != 2) wait();
        touch_early();
        const int parts = (rows + S::kRows - 1) / S::kRows, pairs = p.kv_heads * parts;  // of a sequence
        const Deal deal(Units(p, S::kUnit), pairs, p.batch, gridDim.x);
        if (int(blockIdx.x) < deal.blocks) {
            int at = deal.start(blockIdx.x);
            const int end = deal.start(blockIdx.x + 1);
            bool owing = false;
            if (at < end) {
                int before = 0;
                int b = p.batch == 1 ? 0 : find_sequence(p, S::kUnit, at, pairs, before);
                Sequence sequence(p, b, S::kUnit);
                int pair = (at - before) / sequence.units;
                int begin = before + pair * sequence.units;  // where the pair's units start
                while (true) {
                    const int pair_end = begin + sequence.units;
                    Job job;
                    job.sequence = b;
                    job.kv_head = pair / parts;
                    job.row = (pair - job.kv_head * parts) * S::kRows;
                    job.first = sequence.first + at - begin;
                    job.count = min(pair_end, end) - at;
                    job.length = sequence.length;
                    job.low = sequence.low;
                    attend(job);
                    leave(job, at == begin && pair_end <= end, pair_end > end);
                    if (at != begin && pair_end <= end) {
                        owing = true;
                        if (threadIdx.x == 0) {
                            const int first = deal.owner(begin);
                            *owed = {job, first, int(blockIdx.x) - first + 1};
                        }
                    }
                    at = pair_end;
                    if (at >= end) break;
                    __syncthreads();  // the buffers are free again
                    begin = at;
                    if (++pair == pairs) {
                        pair = 0;
                        do sequence = Sequence(p, ++b, S::kUnit);
                        while (sequence.units == 0);
                    }
                }
                if (owing) {
                    __syncthreads();
                    combine(*owed);
                }
            }
        }
        wait();
        for (int b = blockIdx.x; b < p.batch; b += gridDim.x) {
            if (p.lengths[b] <= 0 || p.max_length <= 0) clear(b);
        }
    }

  private:
    // Scales, and a page table small enough, are asked for while the lengths are on their way: what a block needs of
    // them is then near.
    __device__ __forceinline__ void touch_early() const {
        const int i = int(threadIdx.x) * 8;  // 32 bytes come together
        if (Cached<C>::kBytes == 1 && i < p.kv_heads) {
            touch(p.k_scale + i);
            touch(p.v_scale + i);
        }
        const int columns = (p.max_length + p.page_size - 1) / p.page_size;
        if (int64_t(p.batch) * columns > S::kThreads * 8) return;
        if (i < p.batch * columns) touch(p.page_table + i / columns * p.page_table_stride + i % columns);
    }

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

    // What the rows of a job are normalised and rotated with: read before the row itself is there.
    struct Tables {
        Row<D> angles, q_weights, k_weights;
    };
    __device__ __forceinline__ void load_tables(Tables& tables, const Job& job, int half) const {
        if (!p.append) return;
        if (p.rotary_dim > 0) {
            tables.angles.load_angles(p.positions != nullptr ? p.positions[job.sequence] : job.length - 1, p);
        }
        if (p.q_norm != nullptr) tables.q_weights.load(p.q_norm, half, bfloat16);
        if (p.k_norm != nullptr && mine.warp == 0) tables.k_weights.load(p.k_norm, half, bfloat16);
    }

    // Row r of a job in the fused projection, or null: -2 and -1 are the newest key and value.
    __device__ __forceinline__ const uint16_t* row_of(const Job& job, int r) const {
        const uint16_t* const q = static_cast<const uint16_t*>(p.q) + job.sequence * p.q_batch_stride;
        if (r < 0) return q + (p.heads + (r == -1 ? p.kv_heads : 0) + job.kv_head) * D;
        if (r >= S::kRows || job.row + r >= rows) return nullptr;
        const int token = (job.row + r) / group, head = job.kv_head * group + (job.row + r) % group;
        return q + token * p.q_token_stride + head * p.q_head_stride;
    }

    // Query rows into shared memory, as the matrix unit takes them; with `append` also the newest key and value, by the
    // block that has the pair's last key.
    __device__ __forceinline__ void prepare(const Job& job, const Tables& tables, int half) {
        const bool newest = p.append && (job.first + job.count) * S::kUnit >= job.length;
        // all warps take their rows in turn, the two new ones first; a row's successor is on its way meanwhile
        int r = mine.warp - (newest ? 2 : 0);
        Row<D> row, next;
        const uint16_t* from = row_of(job, r);
        if (from != nullptr) row.load(from, half, bfloat16);
        for (; r < S::kRows; r += S::kWarps) {
            const uint16_t* const after = row_of(job, r + S::kWarps);
            if (after != nullptr) next.load(after, half, bfloat16);
            if (r < 0) {
                const bool is_v = r == -1;
                if (!is_v) {
                    if (p.k_norm != nullptr) row.normalise(tables.k_weights, p);
                    row.rotate(tables.angles, p);
                }
                // blocks with other query rows of this pair make the same values and leave the cache alone
                row.store_cached(job.row == 0 ? newest_in_cache(job, is_v) : nullptr,
                                 reinterpret_cast<C*>(k_new + (is_v ? S::kRowBytes : 0)), half,
                                 Cached<C>::kBytes == 2 ? 1.0f : (is_v ? p.v_scale : p.k_scale)[job.kv_head]);
            } else if (from != nullptr) {
                if (p.append) {
                    if (p.q_norm != nullptr) row.normalise(tables.q_weights, p);
                    row.rotate(tables.angles, p);
                }
                const float factor =
                    row.store_query(queries + r * S::kQueryPitch, half, Cached<C>::kBytes == 1, bfloat16);
                if (mine.lane == 0) factors[r] = factor;
            } else {
                for (int i = mine.lane; i < D / 2; i += 32) {
                    reinterpret_cast<uint32_t*>(queries + r * S::kQueryPitch)[i] = 0;
                }
                if (mine.lane == 0) factors[r] = 0.0f;
            }
            row = next;
            from = after;
        }
    }

    __device__ __forceinline__ C* newest_in_cache(const Job& job, bool is_v) const {
        const int key = job.length - 1, within = key % p.page_size;
        const int64_t page = p.page_table[job.sequence * p.page_table_stride + key / p.page_size];
        return is_v ? static_cast<C*>(p.v_cache) + page * p.v_page_stride + job.kv_head * p.v_head_stride +
                          within * p.v_token_stride
                    : static_cast<C*>(p.k_cache) + page * p.k_page_stride + job.kv_head * p.k_head_stride +
                          within * p.k_token_stride;
    }

    __device__ __forceinline__ void wait_for_copies() const {
        // the instruction takes a constant
        switch (stages) {
            case 2: ptx::copy_async_wait<0>(); break;
            case 3: ptx::copy_async_wait<1>(); break;
            case 4: ptx::copy_async_wait<2>(); break;
            case 5: ptx::copy_async_wait<3>(); break;
            default: ptx::copy_async_wait<4>(); break;
        }
    }

    __device__ __forceinline__ void attend(const Job& job) {
        constexpr bool kQueriesInRegisters = D * NT <= 256;
        mine.start(job);
        int pages[kMaxStages];
#pragma unroll
        for (int i = 0; i < kMaxStages; ++i) {
            pages[i] = i < stages && i < job.count ? mine.page_of(job.first + i) : 0;
        }
        int next_page = 0;
#pragma unroll
        for (int i = 0; i < kMaxStages; ++i) {
            if (i < stages - 1) {
                if (i < job.count) mine.load(job.first + i, pages[i], i);
                ptx::copy_async_commit();
            } else if (i == stages - 1) {
                next_page = pages[i];
            }
        }
        const int half = p.append && !p.interleaved ? p.rotary_dim / 2 : 0;
        Tables tables;
        load_tables(tables, job, half);
        wait();
        prepare(job, tables, half);
        __syncthreads();

        uint32_t fragments[kQueriesInRegisters ? D / 16 : 1][NT][2];
        if constexpr (kQueriesInRegisters) {
#pragma unroll
            for (int j = 0; j < D / 16; ++j) {
#pragma unroll
                for (int n = 0; n < NT; ++n) mine.query(queries, n, j, fragments[j][n][0], fragments[j][n][1]);
            }
        }
        const auto fragment = [&](int n, int j, uint32_t& b0, uint32_t& b1) {
            if constexpr (kQueriesInRegisters) {
                b0 = fragments[j][n][0], b1 = fragments[j][n][1];
            } else {
                mine.query(queries, n, j, b0, b1);
            }
        };

        // what turns a product into an exponent, for this lane's columns; and the last key each of them sees
        const float k_scale = Cached<C>::kBytes == 2 ? 1.0f : p.k_scale[job.kv_head] * Cached<C>::kFactor;
        const bool extras = p.soft_cap > 0.0f || p.alibi_slopes != nullptr;
        float scales[NT][2], slopes[NT][2];
        int last[NT][2];
#pragma unroll
        for (int n = 0; n < NT; ++n) {
#pragma unroll
            for (int e = 0; e < 2; ++e) {
                const int r = n * 8 + mine.lane % 4 * 2 + e, row = min(job.row + r, rows - 1);
                scales[n][e] = p.scale * k_scale * factors[r] * (extras ? 1.0f : kLog2e);
                slopes[n][e] =
                    p.alibi_slopes == nullptr ? 0.0f : p.alibi_slopes[job.kv_head * group + row % group] * kLog2e;
                last[n][e] = job.length - p.q_length + row / group;
            }
        }
        // keys that every query sees
        const int all_low = p.window > 0 ? job.length - p.window : 0, all_end = job.length - p.q_length + 1;

        int stage = 0, filling = stages - 1;
        for (int i = 0; i < job.count; ++i) {
            wait_for_copies();
            __syncwarp();
            if (i + stages - 1 < job.count) mine.load(job.first + i + stages - 1, next_page, filling);
            ptx::copy_async_commit();
            if (i + stages < job.count) next_page = mine.page_of(job.first + i + stages);

            const int key = mine.key_of(job.first + i);
            if (p.append && job.length - 1 - key >= 0 && job.length - 1 - key < kKeys) {
                mine.place(job.length - 1 - key, k_new, k_new + S::kRowBytes, stage);
                __syncwarp();
            }
            float s[NT][4];
            mine.score(s, stage, fragment);
            const int near = key + mine.lane / 4;
#pragma unroll
            for (int n = 0; n < NT; ++n) {
#pragma unroll
                for (int e = 0; e < 4; ++e) s[n][e] *= scales[n][e % 2];
            }
            if (extras) {
#pragma unroll
                for (int n = 0; n < NT; ++n) {
#pragma unroll
                    for (int e = 0; e < 4; ++e) {
                        float x = s[n][e];
                        if (p.soft_cap > 0.0f) x = tanh_fast(x / p.soft_cap) * p.soft_cap;
                        s[n][e] = fmaf(slopes[n][e % 2], float(near + e / 2 * 8 - last[n][e % 2]), x * kLog2e);
                    }
                }
            }
            if (key < all_low || key + kKeys > all_end) {
#pragma unroll
                for (int n = 0; n < NT; ++n) {
#pragma unroll
                    for (int e = 0; e < 4; ++e) {
                        const int behind = last[n][e % 2] - (near + e / 2 * 8);
                        if (behind < 0 || (p.window > 0 && behind >= p.window)) s[n][e] = -INFINITY;
                    }
                }
            }
            uint32_t b[NT][2];
            mine.weigh(s, b);
            mine.add(b, stage);
            stage = stage + 1 == stages ? 0 : stage + 1;
            filling = filling + 1 == stages ? 0 : filling + 1;
        }
    }

    __device__ __forceinline__ float* part_of(int block, bool goes_on) const {
        return static_cast<float*>(p.workspace) + (2 * int64_t(block) + goes_on) * S::kPartFloats;
    }

    // The warps' sums put together: the result where the block has the `whole` pair, or its part of it.
    __device__ __forceinline__ void leave(const Job& job, bool whole, bool goes_on) {
        ptx::copy_async_wait<0>();
        __syncthreads();  // nobody reads the buffers any more
        float* const sums = reinterpret_cast<float*>(shared);
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
                store(job, r, column, total, all > 0.0f ? 1.0f / all : 0.0f);
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
            store(job, r, column, total, all > 0.0f ? 1.0f / all : 0.0f);
        }
        __syncthreads();  // the statistics have been read by all
        for (int i = threadIdx.x; i < here * count; i += S::kThreads) {
            const int r = i / count, n = i - r * count;
            *reinterpret_cast<float2*>(part_of(first + n, n + 1 < count) + S::kRows * D + 2 * r) = float2{};
        }
    }

    __device__ __forceinline__ void store(const Job& job, int r, int column, float4 x, float factor) const {
        if (Cached<C>::kBytes == 1) factor *= p.v_scale[job.kv_head] * Cached<C>::kFactor;
        const int token = (job.row + r) / group, head = job.kv_head * group + (job.row + r) % group;
        const uint2 four =
            make_uint2(narrow(x.x * factor, x.y * factor, bfloat16), narrow(x.z * factor, x.w * factor, bfloat16));
        *reinterpret_cast<uint2*>(out_row(job.sequence, token, head) + column) = four;
    }
};

// Elsewhere shared memory holds one block, and registers need no limit.
#if __CUDA_ARCH__ == 800 || __CUDA_ARCH__ == 900
#define TRTLLM_MMHA_RESIDENT(C, D, NT) Shape<C, D, NT>::kResident
#else
#define TRTLLM_MMHA_RESIDENT(C, D, NT) 1
#endif

template <typename C, int D, int NT>
__global__ void __launch_bounds__(Shape<C, D, NT>::kThreads, TRTLLM_MMHA_RESIDENT(C, D, NT))
    mmha_kernel(const __grid_constant__ trtllm_mmha_params p, int stages) {
    extern __shared__ __align__(1024) unsigned char shared[];
    Block<C, D, NT>(p, shared, stages).run();
}

}  // namespace trtllm::mmha
