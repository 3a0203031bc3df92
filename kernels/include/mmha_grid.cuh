// The grid of generation attention: each block's run of work.
#pragma once

#include "mmha_parts.cuh"
#include "mmha_queries.cuh"

namespace trtllm::mmha {

template <typename C, int D, int NT>
class Block {
    using S = Shape<C, D, NT>;

    const trtllm_mmha_params& p;
    unsigned char* const shared;
    const int stages;
    Queries<C, D, NT> first_rows;
    Parts<C, D, NT> sums;
    Warp<C, D, NT> mine;
    Owed* const owed;
    const int group, rows;  // query heads a kv head; query rows a pair
    bool waited = false;

  public:
    __device__ __forceinline__ Block(const trtllm_mmha_params& params, unsigned char* memory, int stage_count)
        : p(params),
          shared(memory + S::kFixedBytes),
          stages(stage_count),
          first_rows(params, memory),
          sums(params),
          mine(params, memory + S::kFixedBytes, stage_count),
          owed(reinterpret_cast<Owed*>(first_rows.factors + S::kRows)),
          group(first_rows.group),
          rows(first_rows.rows) {}

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
                    sums.leave(mine, reinterpret_cast<float*>(shared), job, at == begin && pair_end <= end,
                               pair_end > end);
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
                    sums.combine(*owed);
                }
            }
        }
        wait();
        for (int b = blockIdx.x; b < p.batch; b += gridDim.x) {
            if (p.lengths[b] <= 0 || p.max_length <= 0) sums.clear(b);
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
        typename Queries<C, D, NT>::Tables tables;
        first_rows.load_tables(tables, job, half);
        // what turns a product into an exponent, for this lane's columns; and the last key each of them sees
        const float k_scale = Cached<C>::kBytes == 2 ? 1.0f : p.k_scale[job.kv_head] * Cached<C>::kFactor;
        const bool extras = p.soft_cap > 0.0f || p.alibi_slopes != nullptr;
        float scales[NT][2], slopes[NT][2];
        int last[NT][2];
#pragma unroll
        for (int n = 0; n < NT; ++n) {
#pragma unroll
            for (int e = 0; e < 2; ++e) {
                const int row = min(job.row + n * 8 + mine.lane % 4 * 2 + e, rows - 1);
                scales[n][e] = p.scale * k_scale * (extras ? 1.0f : kLog2e);
                slopes[n][e] =
                    p.alibi_slopes == nullptr ? 0.0f : p.alibi_slopes[job.kv_head * group + row % group] * kLog2e;
                last[n][e] = job.length - p.q_length + row / group;
            }
        }
        wait();
        first_rows.prepare(job, tables, half);
        __syncthreads();
#pragma unroll
        for (int n = 0; n < NT; ++n) {
#pragma unroll
            for (int e = 0; e < 2; ++e) scales[n][e] *= first_rows.factors[n * 8 + mine.lane % 4 * 2 + e];
        }

        uint32_t fragments[kQueriesInRegisters ? D / 16 : 1][NT][2];
        if constexpr (kQueriesInRegisters) {
#pragma unroll
            for (int j = 0; j < D / 16; ++j) {
#pragma unroll
                for (int n = 0; n < NT; ++n) {
                    mine.query(first_rows.queries, n, j, fragments[j][n][0], fragments[j][n][1]);
                }
            }
        }
        const auto fragment = [&](int n, int j, uint32_t& b0, uint32_t& b1) {
            if constexpr (kQueriesInRegisters) {
                b0 = fragments[j][n][0], b1 = fragments[j][n][1];
            } else {
                mine.query(first_rows.queries, n, j, b0, b1);
            }
        };

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
                mine.place(job.length - 1 - key, first_rows.k_new, first_rows.k_new + S::kRowBytes, stage);
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
