// The sampling kernel. A row lives in the shared memory of a cluster of thread blocks; thresholds are found by histograms
// over the distance to the largest logit. As soon as a histogram shows that few elements matter, these move to the first
// block, in order of id, and the others are done.
#pragma once

#include "ptx.cuh"
#include "row.cuh"
#include "trtllm_kernels/sampling.h"

namespace trtllm::sampling {

// A histogram spans at least so many nats below the largest logit at temperature 1: what lies beyond weighs nothing.
constexpr float kSpan = 28.0f;

template <typename T>
struct Row {
    static constexpr int V = 16 / int(sizeof(T));
    struct alignas(16) Pack {
        T at[V];
    };

    const trtllm_sampling_params& p;
    Blocks blocks;
    Part part;
    Weights weights;

    // ---- elements ---------------------------------------------------------------------------------------------------

    __device__ __forceinline__ float element(int id) const {
        if (id < 0 || id >= p.vocab) return -INFINITY;
        const Source& source = blocks.shared.source;
        return source.penalized(float(static_cast<const T*>(source.logits)[id]),
                                source.counts == nullptr ? int16_t(0) : source.counts[id]);
    }
    // Four slots from `slot`, a multiple of 4.
    __device__ __forceinline__ float4 fetch(int slot) const {
        if (part.values != nullptr) return *reinterpret_cast<const float4*>(part.values + slot);
        const int id = part.first_id + slot;
        return make_float4(element(id), element(id + 1), element(id + 2), element(id + 3));
    }
    template <typename Each>
    __device__ __forceinline__ void each(const Each& visit) const {
        for (int slot = int(threadIdx.x) * 4; slot < part.slots; slot += kThreads * 4) {
            const float4 four = fetch(slot);
            visit(four.x);
            visit(four.y);
            visit(four.z);
            visit(four.w);
        }
    }

    // Reads this block's share of the row, `store` (may be NULL) keeps it. Gives the largest element with the least id
    // as key << 32 | ~id, and the largest possible word when something is NaN or positive infinity.
    __device__ uint64_t read(float* store) const {
        const Source source = blocks.shared.source;
        const T* logits = static_cast<const T*>(source.logits);
        const int16_t* counts = source.counts;
        uint64_t best = 0;
        bool bad = false;
        const int vectors = part.slots / V, first = part.first_id;
        const bool together = counts != nullptr && reinterpret_cast<uintptr_t>(counts + first) % (2 * V) == 0;
        constexpr int kAhead = 16 / V;  // 32 to 64 bytes in flight a thread
        for (int begin = int(threadIdx.x); begin < vectors; begin += kAhead * kThreads) {
            Pack raw[kAhead];
#pragma unroll
            for (int n = 0; n < kAhead; ++n) {
                const int vector = begin + n * kThreads, id = first + vector * V;
                if (vector < vectors && id >= 0 && id + V <= p.vocab) {
                    raw[n] = *reinterpret_cast<const Pack*>(logits + id);
                }
            }
#pragma unroll
            for (int n = 0; n < kAhead; ++n) {
                const int vector = begin + n * kThreads, id = first + vector * V;
                if (vector >= vectors) break;
                float x[V];
                if (id >= 0 && id + V <= p.vocab) {
                    if (counts == nullptr) {
#pragma unroll
                        for (int i = 0; i < V; ++i) x[i] = float(raw[n].at[i]) + 0.0f;
                    } else {
                        struct alignas(2 * V) Counts {
                            int16_t at[V];
                        } seen;
                        if (together) {
                            seen = *reinterpret_cast<const Counts*>(counts + id);
                        } else {
#pragma unroll
                            for (int i = 0; i < V; ++i) seen.at[i] = counts[id + i];
                        }
#pragma unroll
                        for (int i = 0; i < V; ++i) x[i] = source.penalized(float(raw[n].at[i]), seen.at[i]);
                    }
                } else {
#pragma unroll
                    for (int i = 0; i < V; ++i) x[i] = element(id + i);
                }
                float top = x[0];
#pragma unroll
                for (int i = 1; i < V; ++i) top = fmaxf(top, x[i]);
#pragma unroll
                for (int i = 0; i < V; ++i) bad = bad || !(x[i] < INFINITY);
                if (key_of(top) > uint32_t(best >> 32)) {  // ids rise, so an equal one is no better
                    int at = V - 1;
#pragma unroll
                    for (int i = V - 2; i >= 0; --i) at = x[i] == top ? i : at;
                    best = uint64_t(key_of(top)) << 32 | uint32_t(~(id + at));
                }
                if (store != nullptr) {
#pragma unroll
                    for (int i = 0; i < V; i += 4) {
                        *reinterpret_cast<float4*>(store + vector * V + i) =
                            make_float4(x[i], x[i + 1], x[i + 2], x[i + 3]);
                    }
                }
            }
        }
        return bad ? kWithoutLimit : best;
    }

    // ---- thresholds -------------------------------------------------------------------------------------------------

    // A histogram of counts or weights and where its running sum, on top of `above`, reaches the target, which
    // `target_of` makes from the whole sum. `tracked` also keeps the range of keys in each bin.
    template <bool ByWeight, typename Target>
    __device__ Reached histogram(const Binning& bins, bool tracked, uint64_t above, const Target& target_of) {
        Shared& shared = blocks.shared;
        const int turn = blocks.turn, t = int(threadIdx.x);
        blocks.turn ^= 1;
        if (t < kBins) {
            shared.low[turn][t] = shared.high[turn][t] = shared.most[turn][t] = 0;
            shared.least[turn][t] = ~0u;
        }
        __syncthreads();
        // after the barrier: until there, some may still read what the histogram before has found
        if (t == 0) shared.bin = kBins;
        // a first count over a long row leaves out the last bin, where everything unlikely would queue for one word
        const int last = bins.linear && !tracked && !ByWeight ? kBins - 1 : kBins;
        each([&](float x) {
            const int bin = bins(x);
            if (bin < 0 || bin >= last) return;
            if constexpr (ByWeight) {
                const uint64_t w = weights(x);
                const uint32_t low = uint32_t(w);
                const uint32_t before = atomicAdd(&shared.low[turn][bin], low);
                const uint32_t high = uint32_t(w >> 32) + (before + low < before);
                if (high != 0) atomicAdd(&shared.high[turn][bin], high);
            } else {
                atomicAdd(&shared.low[turn][bin], 1u);
            }
            if (tracked) {
                atomicMin(&shared.least[turn][bin], key_of(x));
                atomicMax(&shared.most[turn][bin], key_of(x));
            }
        });
        blocks.meet();
        uint64_t mine = 0, running = 0;
        if (t < kBins) {
            for (int first = 0; first < blocks.count; first += 8) {
                uint32_t low[8], high[8];  // all on their way at once
#pragma unroll
                for (int n = 0; n < 8; ++n) {
                    const bool there = first + n < blocks.count;
                    low[n] = there ? *blocks.of(&shared.low[turn][t], first + n) : 0;
                    high[n] = ByWeight && there ? *blocks.of(&shared.high[turn][t], first + n) : 0;
                }
#pragma unroll
                for (int n = 0; n < 8; ++n) mine += (uint64_t(high[n]) << 32) + low[n];
            }
            running = scan_warp(mine);
            if (t % 32 == 31) shared.scanned[t / 32] = running;
        }
        __syncthreads();
        uint64_t total = 0;
        for (int warp = 0; warp < kBins / 32; ++warp) {
            if (warp < t / 32) running += shared.scanned[warp];
            total += shared.scanned[warp];
        }
        const uint64_t target = target_of(total);
        if (t < kBins && above + running >= target && above + running - mine < target) {
            shared.bin = t;
            shared.above = above + running - mine;
        }
        __syncthreads();
        const int bin = shared.bin;
        return {bin, bin < kBins ? shared.above : above + total, target};
    }

    // The range of keys that fell into `bin` of the histogram just made.
    __device__ Binning within(int bin) {
        const int turn = blocks.turn ^ 1, lane = int(threadIdx.x) % 32;
        uint32_t least = ~0u, most = 0;
        if (lane < blocks.count) {
            least = *blocks.of(&blocks.shared.least[turn][bin], lane);
            most = *blocks.of(&blocks.shared.most[turn][bin], lane);
        }
        return by_key(__reduce_min_sync(~0u, least), __reduce_max_sync(~0u, most));
    }

    // From the bin in which the target is reached to the very key; `found.above` becomes the sum above that key.
    template <bool ByWeight>
    __device__ uint32_t refine(Binning bins, Reached& found) {
        while (bins.least < bins.most) {
            const uint64_t target = found.target;
            found = histogram<ByWeight>(bins, true, found.above, [&](uint64_t) { return target; });
            if (found.bin == kBins) return kLeastKey;  // fewer elements than asked for
            bins = within(found.bin);
        }
        return bins.most;
    }

    // The same for a histogram that kept no ranges.
    template <bool ByWeight>
    __device__ uint32_t refine_untracked(const Binning& bins, Reached& found) {
        uint64_t least = 0, most = 0;  // complement of the least key, the greatest
        const int bin = found.bin == kBins ? kBins - 1 : found.bin;
        each([&](float x) {
            if (bins(x) != bin) return;
            least = Largest::of(least, uint32_t(~key_of(x)));
            most = Largest::of(most, key_of(x));
        });
        least = blocks.over_row<Largest>(least);
        most = blocks.over_row<Largest>(most);
        if (most == 0) return kLeastKey;
        if (uint32_t(~least) == uint32_t(most)) return uint32_t(most);
        return refine<ByWeight>(by_key(~uint32_t(least), uint32_t(most)), found);
    }

    // Moves the elements of the bins up to `last` to the first block, in order of id, if they are few enough.
    __device__ bool gather(const Binning& bins, int last) {
        Shared& shared = blocks.shared;
        const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32;
        const int segment = part.slots / kWarps, start = warp * segment;
        const auto wanted = [&](float x) {
            const int bin = bins(x);
            return bin >= 0 && bin <= last;
        };
        uint32_t n = 0;
        for (int slot = start + lane * 4; slot < start + segment; slot += 128) {
            const float4 four = fetch(slot);
            n += wanted(four.x) + wanted(four.y) + wanted(four.z) + wanted(four.w);
        }
        n = __reduce_add_sync(~0u, n);
        uint64_t* words = shared.warps[blocks.warp_turn];
        blocks.warp_turn ^= 1;
        if (lane == 0) words[warp] = n;
        __syncthreads();
        const uint64_t upto = scan_warp(lane < kWarps ? words[lane] : 0);
        const uint64_t theirs = blocks.exchange(__shfl_sync(~0u, upto, 31));
        const uint64_t ranks = scan_warp(theirs);
        if (__shfl_sync(~0u, ranks, 31) > kListed) return false;
        int to = int(__shfl_sync(~0u, ranks - theirs, blocks.rank) + __shfl_sync(~0u, upto, warp)) - int(n);
        float* listed = blocks.of(shared.listed, 0);
        int32_t* ids = blocks.of(shared.ids, 0);
        for (int slot = start + lane * 4; n > 0 && slot < start + segment; slot += 128) {
            const float4 four = fetch(slot);
            const float x[4] = {four.x, four.y, four.z, four.w};
            uint32_t here = 0;
#pragma unroll
            for (int i = 0; i < 4; ++i) here += wanted(x[i]);
            if (!__any_sync(~0u, here != 0)) continue;
            uint32_t running = here;
#pragma unroll
            for (int step = 1; step < 32; step *= 2) {
                const uint32_t other = __shfl_up_sync(~0u, running, step);
                if (lane >= step) running += other;
            }
            int at = to + int(running - here);
            to += int(__shfl_sync(~0u, running, 31));
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                if (wanted(x[i])) {
                    listed[at] = x[i];
                    ids[at++] = part.id(slot + i);
                }
            }
        }
        blocks.meet();
        return true;
    }

    // ---- the place where a running sum passes a target ----------------------------------------------------------------

    // In order of id, the first element whose measure, added to those before it, exceeds the target; `target_of` makes it
    // from the whole sum. `give` is called with its id by one thread of the cluster.
    template <typename Measure, typename Target, typename Give>
    __device__ void locate(const Measure& measure, const Target& target_of, const Give& give) {
        Shared& shared = blocks.shared;
        const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32;
        const int segment = part.slots / kWarps, start = warp * segment;
        const auto sum_of = [&](int slot) {
            const float4 four = fetch(slot);
            return measure(four.x, slot) + measure(four.y, slot + 1) + measure(four.z, slot + 2) +
                   measure(four.w, slot + 3);
        };
        // lane i keeps the sum of the i-th group of 128 slots or a few times as many
        const int group = (segment / 128 + 31) / 32 * 128;
        uint64_t grouped = 0;
        for (int slot = start, of = 0, upto = start + group; slot < start + segment; slot += 128) {
            if (slot == upto) {
                upto += group;
                ++of;
            }
            const uint64_t together = sum_of_warp(sum_of(slot + lane * 4));
            grouped += lane == of ? together : 0;
        }
        const uint64_t sum = over_warp<Sum>(grouped);
        uint64_t* words = shared.warps[blocks.warp_turn];
        blocks.warp_turn ^= 1;
        if (lane == 0) words[warp] = sum;
        __syncthreads();
        const uint64_t upto = scan_warp(lane < kWarps ? words[lane] : 0);
        uint64_t before = 0, total = __shfl_sync(~0u, upto, 31);
        if (blocks.count > 1) {
            const uint64_t theirs = blocks.exchange(total);
            const uint64_t ranks = scan_warp(theirs);
            total = __shfl_sync(~0u, ranks, 31);
            before = __shfl_sync(~0u, ranks - theirs, blocks.rank);
        }
        const uint64_t target = target_of(total);
        before += __shfl_sync(~0u, upto, warp) - sum;
        if (target < before || target >= before + sum) return;  // not in this warp's elements
        const uint64_t groups = scan_warp(grouped);
        const int in = __ffs(__ballot_sync(~0u, before + groups > target)) - 1;
        uint64_t left = target - before - __shfl_sync(~0u, groups - grouped, in);
        for (int slot = start + in * group + lane * 4; slot < start + segment; slot += 128) {
            const uint64_t mine = sum_of(slot);
            const uint64_t running = scan_warp(mine);
            const uint64_t row = __shfl_sync(~0u, running, 31);
            if (left >= row) {
                left -= row;
                continue;
            }
            if (running > left && running - mine <= left) {
                const float4 four = fetch(slot);
                const float x[4] = {four.x, four.y, four.z, four.w};
                uint64_t passed = running - mine;
                int at = 0;
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    passed += measure(x[i], slot + i);
                    at += passed <= left;
                }
                give(part.id(slot + at));
            }
            return;
        }
    }

    // ---- a row --------------------------------------------------------------------------------------------------------

    __device__ void choose(int row, int id) const {
        p.tokens[row] = id;
        if (p.advance && id >= 0) advance(p, row, id);
    }

    // From here on the first block is alone with the listed elements.
    __device__ void alone() {
        blocks.count = 1;
        part = {blocks.shared.listed, blocks.shared.ids, 0, kListed};
    }

    // A key that at least k elements reach: the greatest elements of a block's threads are such elements.
    __device__ uint32_t reached_by(int k, uint32_t greatest) {
        uint32_t key = 0;
        for (uint32_t bit = 1u << 31; bit >= 1u << 13; bit >>= 1) {
            if (__syncthreads_count(greatest >= (key | bit)) >= k) key |= bit;
        }
        return uint32_t(blocks.over_row<Largest>(max(key, kLeastKey)));
    }

    // What a sampled row is decided by, once its largest element is known; `greatest` is the key of the largest that
    // this thread has read.
    __device__ void sample(int row, float temperature, uint32_t greatest) {
        const Source& asked = blocks.shared.source;
        const int k = asked.top_k;
        const float top_p = fmaxf(asked.top_p, 0.0f);
        const float min_p = fminf(fmaxf(asked.min_p, 0.0f), 1.0f);
        const float scale = float(kBins - 1) / (kSpan * fmaxf(temperature, 1.0f));
        uint32_t least = kLeastKey;
        bool whole = true;

        if (k > 0 && k < p.vocab) {
            const auto target = [&](uint64_t) { return uint64_t(k); };
            Binning bins = {least, ~0u, true, weights.largest, scale, 0};
            const uint32_t reached = k <= kThreads / 2 ? reached_by(k, greatest) : 0;
            if (reached != 0 && gather({reached, ~0u, false, 0.0f, 0.0f, 31}, 1)) {
                whole = false;
                bins.scale = float(kBins - 1) / (weights.largest - of_key(reached));
            }
            Reached found = {};
            if (whole) {
                found = histogram<false>(bins, false, 0, target);
                if (found.bin < kBins && gather(bins, found.bin)) {
                    whole = false;
                    bins.scale *= float(kBins - 1) / float(found.bin + 1);
                } else {
                    least = refine_untracked<false>(bins, found);
                }
            }
            if (!whole) {
                if (blocks.rank != 0) return;
                alone();
                found = histogram<false>(bins, true, 0, target);
                least = found.bin == kBins ? kLeastKey : refine<false>(within(found.bin), found);
            }
        }
        uint32_t last_key = 0;
        int last_id = 0x7fffffff;
        if (top_p < 1.0f) {
            // p as a fraction of 2^32: ceil(p * total) without rounding
            const uint64_t fraction = uint64_t(double(top_p) * 4294967296.0);
            const auto share = [&](uint64_t total) {
                const uint64_t low = total * fraction;
                const uint64_t target = __umul64hi(total, fraction) << 32 | low >> 32;
                return max(target + (uint32_t(low) != 0), uint64_t(1));
            };
            Binning bins = {least, ~0u, true, weights.largest, scale, 0};
            Reached found = histogram<true>(bins, !whole, 0, share);
            if (!whole) {
                least = refine<true>(within(found.bin), found);
            } else if (gather(bins, found.bin)) {
                if (blocks.rank != 0) return;
                alone();
                const uint64_t target = found.target;
                bins.scale *= float(kBins - 1) / float(found.bin + 1);
                found = histogram<true>(bins, true, 0, [&](uint64_t) { return target; });
                least = refine<true>(within(found.bin), found);
            } else {
                least = refine_untracked<true>(bins, found);
            }
            // equals of the last one stay in order of id, until the target is reached
            const uint64_t each_weighs = weights(of_key(least));
            const uint64_t wanted = (found.target - found.above + each_weighs - 1) / max(each_weighs, uint64_t(1));
            uint64_t equals = 0;
            each([&](float x) { equals += key_of(x) == least; });
            equals = blocks.over_row<Sum>(equals);
            if (wanted < equals) {
                last_key = least;
                locate([&](float x, int) { return uint64_t(key_of(x) == last_key); },
                       [&](uint64_t) { return wanted - 1; },
                       [&](int id) {
                           for (int rank = 0; rank < blocks.count; ++rank) {
                               *blocks.of(&blocks.shared.last_tie, rank) = id;
                           }
                       });
                blocks.meet();
                last_id = blocks.shared.last_tie;
            }
        }
        const uint64_t floor = uint64_t(double(min_p) * double(uint64_t(1) << kWeightBits));
        const uint64_t random = philox(uint64_t(asked.seed), asked.step);
        locate(
            [&](float x, int slot) {
                const uint32_t key = key_of(x);
                if (key < least || (key == last_key && part.id(slot) > last_id)) return uint64_t(0);
                const uint64_t w = weights(x);
                return w >= floor ? w : uint64_t(0);
            },
            [&](uint64_t total) { return __umul64hi(random, total); }, [&](int id) { choose(row, id); });
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

template <typename T>
__global__ void __launch_bounds__(kThreads, 2) sampling_kernel(const __grid_constant__ trtllm_sampling_params p,
                                                              int slots, bool kept) {
    extern __shared__ __align__(16) unsigned char memory[];
    Shared& shared = *reinterpret_cast<Shared*>(memory);
    float* store = kept ? reinterpret_cast<float*>(memory + sizeof(Shared)) : nullptr;
    const int ranks = p.cluster;
    const int row = int(blockIdx.x) / ranks, rank = int(blockIdx.x) % ranks;
    for (int i = int(threadIdx.x); i < kListed; i += kThreads) shared.listed[i] = -INFINITY;
    ptx::wait_for_previous_kernel();
    ptx::let_next_kernel_start();

    const T* logits = static_cast<const T*>(p.logits) + row * p.logits_stride;
    // slots start where 16 bytes do, so that rows of odd length are read in vectors too
    const int offset = int(reinterpret_cast<uintptr_t>(logits) % 16 / sizeof(T));
    const float temperature = p.temperature == nullptr ? 0.0f : p.temperature[row];
    if (threadIdx.x == 0) {
        const auto neutral = [&](const float* of, float value) { return of == nullptr ? value : of[row]; };
        Source& source = shared.source;
        source.logits = logits;
        source.repetition = neutral(p.repetition, 1.0f);
        source.frequency = neutral(p.frequency, 0.0f);
        source.presence = neutral(p.presence, 0.0f);
        const bool penalties = source.repetition != 1.0f || source.frequency != 0.0f || source.presence != 0.0f;
        source.counts = p.counts != nullptr && penalties ? p.counts + row * p.counts_stride : nullptr;
    } else if (threadIdx.x == 32) {
        Source& source = shared.source;
        start_copy(source.top_k, p.top_k, row, 0);
        start_copy(source.top_p, p.top_p, row, 1.0f);
        start_copy(source.min_p, p.min_p, row, 0.0f);
        start_copy(source.step, reinterpret_cast<const uint32_t*>(p.steps), row, 0u);
        start_copy(source.seed, p.seeds, row, int64_t(0));
        ptx::copy_async_commit();
    }
    __syncthreads();
    Row<T> state = {p, {shared, rank, ranks}, {store, nullptr, rank * slots - offset, slots}, {0.0f, 1.0f}};
    const uint64_t mine = state.read(store);
    ptx::copy_async_wait<0>();  // seen by all after the barrier of the reduction
    const uint64_t best = state.blocks.template over_row<Largest>(mine);
    const float largest = of_key(uint32_t(best >> 32));
    const bool bad = best == kWithoutLimit || uint32_t(best >> 32) < kLeastKey;
    if (bad || !(temperature > 0.0f)) {
        if (rank == 0 && threadIdx.x == 0) state.choose(row, bad ? -1 : int(~uint32_t(best)));
    } else {
        state.weights = Weights(largest, temperature);
        state.sample(row, temperature, uint32_t(mine >> 32));
    }
#if __CUDA_ARCH__ >= 900
    // nobody's shared memory goes away while others may read it
    if (ranks > 1) cooperative_groups::this_cluster().sync();
#endif
}

}  // namespace trtllm::sampling
