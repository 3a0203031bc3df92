// The sampling kernel. A row lives in the shared memory of a cluster of thread blocks. Where a bound known beforehand leaves
// few elements, these go to the first block, which decides alone. Else all blocks draw together: a token that top-p does not
// keep is thrown away, with all that is less likely, and the next one drawn. The k-th largest of many is found by histograms.
#pragma once

#include "few.cuh"
#include "ptx.cuh"
#include "trtllm_kernels/sampling.h"

namespace trtllm::sampling {

// A histogram spans at least so many nats below the largest logit at temperature 1: what lies beyond weighs nothing.
constexpr float kSpan = 28.0f;
template <typename T, bool Kept>
struct Row : Few<T, Kept> {
    using Base = Few<T, Kept>;
    using Base::blocks;
    using Base::choose;
    using Base::each;
    using Base::finish;
    using Base::floor;
    using Base::gather;
    using Base::locate;
    using Base::part;
    using Base::random;
    using Base::reached_by;
    using Base::share_of;
    using Base::top_k;
    using Base::top_p;
    using Base::weighs_less;
    using Base::weights;

    // ---- the k-th largest of many -------------------------------------------------------------------------------------

    // Counts the elements of each bin and finds the bin in which the running count, on top of `above`, reaches k. A first
    // count over a long row leaves out the last bin, where everything unlikely would queue for one word.
    __device__ Reached histogram(const Binning& bins, int turn, uint32_t above, uint32_t k) {
        Shared& shared = blocks.shared;
        const int t = int(threadIdx.x), each_has = kBins / blocks.count;
        if (t < kBins) shared.counts[t] = 0;
        __syncthreads();
        // after the barrier: until there, some may still read what the histogram before has found
        if (t == 0) shared.bin = kBins;
        const int last = bins.linear ? kBins - 1 : kBins;
        each([&](float x, int) {
            const int bin = bins(x);
            if (bin >= 0 && bin < last) atomicAdd(&shared.counts[bin], 1u);
        });
        __syncthreads();
        uint32_t mine = 0, running = 0;
        if (t < kBins) {  // to the block in charge of the bin; its words were zero when it started or met the others last
            mine = shared.counts[t];
            if (blocks.spread() && mine > 0) atomicAdd(blocks.of(&shared.sums[turn][t], t / each_has), mine);
        }
        blocks.meet();
        if (t < kBins) {
            if (blocks.spread()) mine = *blocks.of(&shared.sums[turn][t], t / each_has);
            running = scan_warp(mine);
            if (t % 32 == 31) shared.scanned[t / 32] = running;
            shared.sums[turn ^ 1][t] = 0;
        }
        __syncthreads();
        const uint32_t upto = scan_warp(t % 32 < kBins / 32 ? shared.scanned[t % 32] : 0);
        const uint32_t total = __shfl_sync(~0u, upto, 31);
        running += t < 32 ? 0 : __shfl_sync(~0u, upto, t / 32 - 1);
        if (t < kBins && above + running >= k && above + running - mine < k) {
            shared.bin = t;
            shared.above = above + running - mine;
        }
        __syncthreads();
        const int bin = shared.bin;
        return {bin, bin < kBins ? shared.above : above + total};
    }

    // The key of the k-th largest, or of the least finite float where there are fewer.
    __device__ uint32_t key_of_largest(int k) {
        const float scale = float(kBins - 1) / kSpan * fminf(weights.factor * 0.69314718f, 1.0f);
        Binning bins = {kLeastKey, ~0u, true, weights.largest, scale, 0};
        Reached found = histogram(bins, 0, 0, uint32_t(k));
        for (int turn = 1;; turn ^= 1) {
            const int bin = found.bin < kBins ? found.bin : kBins - 1;
            uint64_t from = 0, upto = 0;  // complement of the least key in the bin, the greatest
            each([&](float x, int) {
                if (bins(x) != bin) return;
                from = max(from, uint64_t(uint32_t(~key_of(x))));
                upto = max(upto, uint64_t(key_of(x)));
            });
            from = blocks.template over_row<Largest>(from);
            upto = blocks.template over_row<Largest>(upto);
            if (upto == 0) return kLeastKey;
            bins = by_key(~uint32_t(from), uint32_t(upto));
            if (bins.least == bins.most) return bins.most;
            found = histogram(bins, turn, found.above, uint32_t(k));
            if (found.bin == kBins) return kLeastKey;
        }
    }

    // ---- a row --------------------------------------------------------------------------------------------------------

    // What a sampled row is decided by, once its largest element is known.
    __device__ void sample(int row) {
        const int k = top_k();
        const bool by_floor = k == 0 && !(top_p() < 1.0f) && floor() > 0;
        if (by_floor || (k > 0 && k <= kFew)) {
            const float bound = by_floor ? weighs_less(float(floor())) : reached_by(k);
            const int n = gather(bound);
            if (n >= 0) {
                if (blocks.rank == 0) finish(row, n);
                return;
            }
        }
        // what stands before the end, in order of falling value, of rising id among equals, can be drawn
        float end = of_key(k > 0 ? key_of_largest(k) : kLeastKey);
        int end_id = 0x7fffffff;
        const auto before_end = [&](float x, int slot) {
            return (x > end) | ((x == end) & (part.first_id + slot < end_id));
        };
        const bool by_p = top_p() < 1.0f;
        uint64_t target = 0;
        if (by_p && floor() > 0) {
            uint64_t sum = 0;
            each([&](float x, int) { sum += x >= end ? weights(x) : 0; });
            target = share_of(blocks.template over_row<Sum>(sum));
        }
        const uint64_t floor = this->floor();
        for (uint32_t draw = 0;; ++draw) {
            uint64_t drawn = 0;
            const uint64_t total = locate(
                [&](float x, int slot) {
                    const uint64_t w = weights(x);
                    return (before_end(x, slot) & (w >= floor)) ? w : uint64_t(0);
                },
                k == 0 && floor == 0 && draw == 0, weights,
                [&](uint64_t sum) { return __umul64hi(random(draw), sum); },
                [&](float x, int id) {
                    drawn = uint64_t(key_of(x)) << 32 | uint32_t(id);
                    if (!by_p) choose(row, id);
                });
            if (!by_p) return;
            if (target == 0) target = share_of(total);
            drawn = blocks.template over_row<Largest>(drawn);
            end = of_key(uint32_t(drawn >> 32));
            end_id = int(uint32_t(drawn));
            uint64_t before = 0;
            if (blocks.group_reaches(uint32_t(drawn >> 32))) {
                each([&](float x, int slot) {
                    if (before_end(x, slot)) before += weights(x);
                });
            }
            if (blocks.template over_row<Sum>(before) < target) {
                if (blocks.rank == 0 && threadIdx.x == 0) choose(row, end_id);
                return;
            }
        }
    }

    __device__ void first_largest(int row, uint32_t key) {
        uint64_t first = 0;
        each([&](float x, int slot) {
            if (key_of(x) == key) first = max(first, uint64_t(uint32_t(~(part.first_id + slot))));
        });
        first = blocks.template over_row<Largest>(first);
        if (blocks.rank == 0 && threadIdx.x == 0) choose(row, int(~uint32_t(first)));
    }
};

// of[row], or a value where there is no array; the copy is waited for later.
template <typename T>
__device__ __forceinline__ void start_copy(T& to, const T* of, int row, T otherwise) {
    if (of == nullptr) {
        to = otherwise;
    } else {
        asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(ptx::shared_address(&to)), "l"(of + row),
                     "n"(int(sizeof(T)))
                     : "memory");
    }
}

// Of what min-p keeps.
__device__ __forceinline__ uint64_t least_weight(float min_p) {
    return uint64_t(fminf(fmaxf(min_p, 0.0f), 1.0f) * float(uint64_t(1) << kWeightBits));
}

template <typename T, bool Kept>
__global__ void __launch_bounds__(kThreads, Kept ? 2 : 1) sampling_kernel(const __grid_constant__ trtllm_sampling_params p,
                                                              int slots) {
    extern __shared__ __align__(16) unsigned char memory[];
    Shared& shared = *reinterpret_cast<Shared*>(memory);
    const int ranks = p.cluster;
    const int row = int(blockIdx.x) / ranks, rank = int(blockIdx.x) % ranks;
    Blocks blocks = {shared, rank, ranks};
    if (threadIdx.x < kBins) shared.sums[0][threadIdx.x] = shared.sums[1][threadIdx.x] = 0;
    blocks.start();
    ptx::wait_for_previous_kernel();
    ptx::let_next_kernel_start();

    const T* logits = static_cast<const T*>(p.logits) + row * p.logits_stride;
    // slots start where 16 bytes do, so that rows of odd length are read in vectors too
    const int offset = int(reinterpret_cast<uintptr_t>(logits) % 16 / sizeof(T));
    const float temperature = p.temperature == nullptr ? 0.0f : p.temperature[row];
    if (threadIdx.x == 0) {
        const auto neutral = [&](const float* of, float value) { return of == nullptr ? value : of[row]; };
        Source& source = shared.source;
        source.repetition = neutral(p.repetition, 1.0f);
        source.frequency = neutral(p.frequency, 0.0f);
        source.presence = neutral(p.presence, 0.0f);
        const bool penalties = source.repetition != 1.0f || source.frequency != 0.0f || source.presence != 0.0f;
        source.counts = p.counts != nullptr && penalties ? p.counts + row * p.counts_stride : nullptr;
    } else if (threadIdx.x == 32) {
        shared.taken = 0;
        Source& source = shared.source;
        start_copy(source.top_k, p.top_k, row, 0);
        start_copy(source.top_p, p.top_p, row, 1.0f);
        start_copy(source.min_p, p.min_p, row, 0.0f);
        start_copy(source.step, reinterpret_cast<const uint32_t*>(p.steps), row, 0u);
        start_copy(source.seed, p.seeds, row, int64_t(0));
        ptx::copy_async_commit();
    }
    float* values = reinterpret_cast<float*>(memory + sizeof(Shared));
    Row<T, Kept> state = {{{p, logits, blocks, {values, rank * slots - offset, slots}}, {0.0f, 1.0f}}};
    const float mine = state.read();
    state.blocks.note_largest(mine < INFINITY ? key_of(mine) : ~0u);
    ptx::copy_async_wait<0>();
    if (threadIdx.x == 32) shared.floor = least_weight(shared.source.min_p);
    __syncthreads();  // everybody's elements, and what was asked for, are here
    state.blocks.post_maxima();
    // while they are under way; there is a barrier before anybody wants to know
    if (threadIdx.x == 32) shared.random = philox(uint64_t(shared.source.seed), shared.source.step, 0);
    state.blocks.await_maxima();
    uint32_t best = 0;
#pragma unroll
    for (int i = 0; i < kMaxima; i += 32) best = max(best, shared.maxima[threadIdx.x % 32 + i]);
    best = __reduce_max_sync(~0u, best);
    if (best == ~0u || best < kLeastKey) {  // NaN, infinity, or nothing
        if (rank == 0 && threadIdx.x == 0) state.choose(row, -1);
    } else if (!(temperature > 0.0f)) {
        state.first_largest(row, best);
    } else {
        state.weights = Weights(of_key(best), temperature);
        state.sample(row);
    }
    // nobody's shared memory goes away while others may read it or send to it
    if (ranks > 1) {
        __syncwarp();
        state.blocks.meet();
    }
}

}  // namespace trtllm::sampling
