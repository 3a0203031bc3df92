// Products for up to 8 tokens: bound by how fast weights stream in, so everything serves that.
//
// Work is split by stripes of 16 rows. A block's warps share a stripe by slices of K (or several stripes, where K is
// short), and every warp streams its tiles through a ring of its own: no barrier between warps while streaming, tens
// of kilobytes in flight a multiprocessor, and the first of them asked for before the wait for the previous kernel,
// because weights do not depend on it. A block takes no more than half of a multiprocessor's registers and, where that
// will do, shared memory, and lets the next kernel start with its first instruction: that kernel's rings fill while
// this one waits, sums and ends. Tokens are the second operand of mma.m16n8k16: one token costs as many instructions as
// eight, few enough for int4 at full bandwidth, where ordinary multiplications would not do. Warps meet but once for a
// batch of stripes, to sum their slices in a fixed order; a cluster's blocks send each other theirs, also summed in
// order. Results are bit-identical between runs.
//
// Code that runs once a launch is kept short, in loops rather than unrolled: instructions come from memory too.
#pragma once

#include "weight_only_gemv_epilogue.cuh"
#include "weight_only_gemv_ring.cuh"
#include "weight_only_gemv_x.cuh"

namespace trtllm::weight_only {

__device__ __forceinline__ uint32_t cluster_rank() {
    uint32_t r = 0;
#if __CUDA_ARCH__ >= 900
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(r));
#endif
    return r;
}
// All blocks of the cluster have started, and what they initialised before is there.
__device__ __forceinline__ void cluster_arrive() {
#if __CUDA_ARCH__ >= 900
    asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
#endif
}
__device__ __forceinline__ void cluster_wait() {
#if __CUDA_ARCH__ >= 900
    asm volatile("barrier.cluster.wait.aligned;" ::: "memory");
#endif
}

// What is the same in all lanes of a warp, so that the compiler knows, and keeps it in uniform registers.
__device__ __forceinline__ int uniform(int v) { return __shfl_sync(0xFFFFFFFFu, v, 0); }

// threadIdx.x, of which the compiler does not know that it stays the same: what follows from it takes no registers
// while tiles are multiplied.
__device__ __forceinline__ int thread_again() {
    int thread;
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
    return thread;
}

template <typename T, Kind K, int Group, bool Scaled, bool Cluster>
__global__ void __launch_bounds__((K == Kind::kDense ? kDenseWarps : kGemvWarps) * 32, 2)
    gemv_kernel(const __grid_constant__ trtllm_weight_only_gemm_params p, const __grid_constant__ GemvPlan plan) {
    ptx::let_next_kernel_start();
    extern __shared__ __align__(128) char shared[];
    const int lane = threadIdx.x % 32, warp = uniform(int(threadIdx.x) / 32);
    const int slice = warp & ((1 << plan.slices_log) - 1), group = warp >> plan.slices_log;
    const int cluster_log = Cluster ? plan.cluster_log : 0;
    const int rank = Cluster ? int(cluster_rank()) : 0;
    const int block = int(blockIdx.x) >> cluster_log;
    // units of `groups` stripes of this block
    const int rounds = plan.rounds + (block < plan.rounds_rest ? 1 : 0);
    const int first_stripe = (block * plan.rounds + min(block, plan.rounds_rest)) * plan.groups;
    // the last of all units may be short of stripes
    const int last_stripe = first_stripe + (rounds - 1) * plan.groups + group;
    const int my_rounds = rounds - (last_stripe >= plan.stripes ? 1 : 0);
    // tiles of this warp and of this block
    const int parts_log = cluster_log + plan.slices_log;
    const int64_t my = (rank << plan.slices_log) + slice;
    const int first = int(my * plan.tiles >> parts_log), end = int((my + 1) * plan.tiles >> parts_log);
    const int block_first = int(int64_t(rank) * plan.tiles >> cluster_log);
    const int block_end = int(int64_t(rank + 1) * plan.tiles >> cluster_log);
    const int tokens = int(p.m), each = tokens * 16, outputs = plan.groups * each;

    Ring<K> ring(p, plan, shared, lane, warp, first, end, first_stripe + group, my_rounds);
    // the cluster's blocks send each other their sums, 32 outputs in turn; a block waits for those it finishes
    uint64_t* const arrived = reinterpret_cast<uint64_t*>(shared + kArrivedAt);
    const int block_outputs = rounds * outputs;
#if __CUDA_ARCH__ >= 900
    if constexpr (Cluster) {
        if (threadIdx.x == 0) {
            int own = 0;
            for (int at = rank * 32; at < block_outputs; at += 32 << cluster_log) {
                own += min(32, block_outputs - at);
            }
            ptx::barrier_init(arrived, 1);
            ptx::barrier_init_fence();
            ptx::barrier_expect(arrived, (own * 4) << cluster_log);
        }
        __syncwarp();
        cluster_arrive();
    }
#endif

    // ---- what else does not depend on the kernel before ----
    const Share mine(plan, int64_t(block_first) * kDepth<K>, (block_end - block_first) * (kDepth<K> / 8));
    uint4 norm_weight = make_uint4(0, 0, 0, 0);
    if (p.norm_weight != nullptr && mine.chunk < mine.chunks) {
        norm_weight = load_eight(p, p.norm_weight, mine.first + 8 * mine.chunk);
    }
    // of the stripes of a round
    const auto unit_of = [&](int index) { return int(unsigned(index / 16) * plan.token_inverse >> 16); };
    Extra extra;
    if constexpr (!Cluster) {
        const int index = int(threadIdx.x);
        load_parameters<T, K>(extra, p, first_stripe + unit_of(index), index % 16,
                              index < min(plan.batch, rounds) * outputs);
    }
    prefetch_x<T>(p, mine, tokens);
    if (p.pdl) ptx::wait_for_previous_kernel();

    float* const partial = reinterpret_cast<float*>(shared + kPartialAt);
    float* const records = reinterpret_cast<float*>(shared + plan.records_at);
    float* const reduce = reinterpret_cast<float*>(shared + plan.reduce_at);  // [2][round of a batch][warp][token][16]
    [[maybe_unused]] float* const result =  // of a cluster: [rank][round][group][token][16]
        reinterpret_cast<float*>(shared + plan.result_at);
    char* const all_x = shared + kXAt;
    const bool short_way = tokens == 1 && p.norm_weight == nullptr && mine.chunks <= mine.across;
    if (short_way) {
        if (mine.token == 0) bring_one<T, K, Group, Scaled>(p, mine, all_x, records);
    } else {
        copy_x<T>(p, plan, mine, all_x, tokens);
    }
    if constexpr (!Cluster) {
        const int index = int(threadIdx.x), unit = unit_of(index);
        load_residual<T>(extra, p, first_stripe + unit, (index - unit * each) / 16, index % 16,
                         index < min(plan.batch, rounds) * outputs);
    }
    if (!short_way) {
        if (p.norm_weight != nullptr) {
            sum_squares<T>(p, plan, mine, all_x, partial, tokens, lane);
            __syncthreads();
        }
        convert_x<T, K, Group, Scaled>(p, plan, mine, all_x, records, partial, norm_weight, tokens, lane);
    }
    __syncthreads();

    const uint32_t x = ptx::shared_address(shared + kXAt) + min(lane % 8, tokens - 1) * plan.x_bytes + lane / 8 * 16 -
                       block_first * (2 * kDepth<K>);
    const float* const my_records = records - block_first * (kRecords<K, Group, Scaled> * 8) + lane % 4 * 2;
    int buffer = 0;
    if constexpr (Cluster) cluster_wait();
#pragma unroll 1
    for (int begin = 0; begin < rounds; begin += plan.batch) {
        const int count = min(plan.batch, rounds - begin), total = count * outputs;
        const int stripe = first_stripe + begin * plan.groups;
        if (!Cluster && begin > 0) {
            const int index = thread_again(), unit = unit_of(index);
            load_parameters<T, K>(extra, p, stripe + unit, index % 16, index < total);
            load_residual<T>(extra, p, stripe + unit, (index - unit * each) / 16, index % 16, index < total);
        }
        float* const sums = reduce + buffer * plan.batch * plan.warps * each;
#pragma unroll 1
        for (int round = 0; round < count; ++round) {
            float acc[4] = {}, odd[4] = {};
            if (begin + round < my_rounds) {
#pragma unroll 1
                for (int tile = first; tile < end;) {
                    const char* at = ring.wait();
                    const int chunk_end = min(tile + plan.chunk_tiles, end);
#pragma unroll 1
                    for (; tile < chunk_end; ++tile, at += plan.tile_bytes) {
                        const uint32_t tile_x = x + tile * (2 * kDepth<K>);
                        const float* const tile_records = my_records + tile * (kRecords<K, Group, Scaled> * 8);
                        if constexpr (K == Kind::kInt4) {
                            add_int4<T, Group, Scaled>(acc, at, tile_x, tile_records, lane, p.has_zero);
                        } else if constexpr (K == Kind::kDense) {
                            add_dense<T>(acc, odd, ptx::shared_address(at), tile_x, lane);
                        } else {
                            add_8bit<T, K, Scaled>(acc, at, tile_x, tile_records, lane);
                        }
                    }
                    ring.release();
                }
            }
            float* const to = sums + (round * plan.warps + warp) * each + lane % 4 * 32 + lane / 4;
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                if (lane % 4 * 2 + i < tokens) {
                    to[i * 16] = acc[i] + odd[i];
                    to[i * 16 + 8] = acc[2 + i] + odd[2 + i];
                }
            }
        }
        __syncthreads();
        // ---- the block's slices in order ----
#pragma unroll 1
        for (int at = thread_again(); at - lane < total; at += int(blockDim.x)) {
            const int of = unit_of(at), within = at - of * each;
            const bool valid = at < total;
            float v = 0.0f;
            if (valid) {
                const float* parts = sums + (of << plan.slices_log) * each + within;
#pragma unroll 8
                for (int s = 0; s < 1 << plan.slices_log; ++s) v += parts[s * each];
            }
            if constexpr (Cluster) {
                const int output = begin * outputs + at;
                if (valid) {
                    ptx::store_in_block(result + rank * block_outputs + output, v, arrived,
                                        (output >> 5) & ((1 << cluster_log) - 1));
                }
                continue;
            }
            if (at >= int(blockDim.x)) {
                load_parameters<T, K>(extra, p, stripe + of, within % 16, valid);
                load_residual<T>(extra, p, stripe + of, within / 16, within % 16, valid);
            }
            finish<T, K>(p, v * kStored<T, K, Scaled>, extra, stripe + of, within / 16, within % 16, valid);
        }
        buffer ^= 1;
    }
    if constexpr (Cluster) {
        // ---- the cluster's blocks in order ----
#if __CUDA_ARCH__ >= 900
        ptx::barrier_wait(arrived, 0);
#endif
#pragma unroll 1
        for (int group_of = warp; ; group_of += plan.warps) {
            const int base = ((group_of << cluster_log) + rank) * 32;
            if (base >= block_outputs) break;
            const int at = base + lane, of = at / each, within = at - of * each;
            const bool valid = at < block_outputs;
            load_parameters<T, K>(extra, p, first_stripe + of, within % 16, valid);
            load_residual<T>(extra, p, first_stripe + of, within / 16, within % 16, valid);
            float v = 0.0f;
            if (valid) {
#pragma unroll 4
                for (int r = 0; r < 1 << cluster_log; ++r) v += result[r * block_outputs + at];
            }
            finish<T, K>(p, v * kStored<T, K, Scaled>, extra, first_stripe + of, within / 16, within % 16, valid);
        }
    }
}

}  // namespace trtllm::weight_only
