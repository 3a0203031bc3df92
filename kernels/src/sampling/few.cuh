// The elements that can be kept, where a bound known beforehand leaves few: they go to the first block, which filters and
// draws alone.
#pragma once

#include "elements.cuh"

namespace trtllm::sampling {

// For so many of top-k, the largest of kMaxima groups give a bound that few others reach.
constexpr int kFew = kMaxima / 2;

template <typename T, bool Kept>
struct Few : Elements<T, Kept> {
    using Elements<T, Kept>::p;
    using Elements<T, Kept>::blocks;
    using Elements<T, Kept>::part;
    using Elements<T, Kept>::each;

    Weights weights;

    __device__ void choose(int row, int id) const {
        p.tokens[row] = id;
        if (p.advance && id >= 0) advance(p, row, id);
    }
    __device__ uint64_t random(uint32_t draw) const {
        const Shared& shared = blocks.shared;
        return draw == 0 ? shared.random : philox(uint64_t(shared.source.seed), shared.source.step, draw);
    }
    // What is asked of this row, read where it is needed. 0: all.
    __device__ int top_k() const {
        const int k = blocks.shared.source.top_k;
        return k > 0 && k < p.vocab ? k : 0;
    }
    __device__ float top_p() const { return fmaxf(blocks.shared.source.top_p, 0.0f); }
    __device__ uint64_t floor() const { return blocks.shared.floor; }
    // ceil(p * total) without rounding, p as a fraction of 2^32
    __device__ uint64_t share_of(uint64_t total) const {
        const uint64_t fraction = uint64_t(top_p() * 4294967296.0f), low = total * fraction;
        const uint64_t target = __umul64hi(total, fraction) << 32 | low >> 32;
        return max(target + (uint32_t(low) != 0), uint64_t(1));
    }

    // A value that at least k of the row's elements reach, k <= kMaxima, by the groups' largest: of values between the
    // least and the greatest of these, the greatest that k of them reach.
    __device__ float reached_by(int k) {
        Shared& shared = blocks.shared;
        const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32;
        constexpr int kValues = sizeof(shared.reaching) / sizeof(int32_t);
        float maxima[kMaxima / 32], low = INFINITY;
#pragma unroll
        for (int i = 0; i < kMaxima / 32; ++i) {
            maxima[i] = of_key(shared.maxima[lane + 32 * i]);
            low = fminf(low, maxima[i]);
        }
        low = of_key(__reduce_min_sync(~0u, key_of(low)));
        const float width = __fmul_rn(__fsub_rn(weights.largest, low), 1.0f / kValues);
        const auto value = [&](int j) {
            return j < kValues - 1 ? __fsub_rn(weights.largest, __fmul_rn(width, float(j + 1))) : low;
        };
#pragma unroll
        for (int n = 0; n < kValues / kWarps; ++n) {
            const int j = warp * (kValues / kWarps) + n;
            const float at = value(j);
            uint32_t count = 0;
#pragma unroll
            for (int i = 0; i < kMaxima / 32; ++i) count += maxima[i] >= at;
            count = __reduce_add_sync(~0u, count);
            if (lane == 0) shared.reaching[j] = int(count);
        }
        __syncthreads();
        const uint32_t upper = __ballot_sync(~0u, shared.reaching[lane] >= k);
        const uint32_t lower = __ballot_sync(~0u, shared.reaching[32 + lane] >= k);
        return value(upper != 0 ? __ffs(upper) - 1 : 31 + __ffs(lower));
    }

    // A value below which an element weighs less than `weight` / 2^40, however it is rounded.
    __device__ float weighs_less(float weight) const {
        return weights.largest + (log2f(weight) - float(kWeightBits) - 0.01f) / weights.factor * 1.00001f;
    }

    // Sends the finite elements from `bound` on to the first block and has it weigh them. How many they are, -1 where they
    // are too many.
    __device__ int gather(float bound) {
        Shared& shared = blocks.shared;
        const int t = int(threadIdx.x), lane = t % 32, places = kPlaces / blocks.count;
        if (blocks.group_reaches(key_of(bound))) {
            each([&](float x, int slot) {
                if (!(x >= bound && x > -INFINITY)) return;
                const int at = atomicAdd(&shared.taken, 1);
                if (at >= places) return;
                const Candidate found = {key_of(x), part.first_id + slot};
                Candidate* to = &shared.listed[blocks.rank * places + at];
                if (blocks.spread()) {
                    ptx::store_in_block(to, found, &shared.listed_here, 0);
                } else {
                    *to = found;
                }
            });
        }
        __syncthreads();
        const int theirs = int(blocks.exchange(uint64_t(shared.taken)));
        const int sent = __reduce_add_sync(~0u, min(theirs, places));
        const bool few = __all_sync(~0u, theirs <= places) && sent <= kListed;
        if (blocks.rank == 0) {
            if (blocks.spread()) {  // even if they are too many, none may come when this block has ended
                if (t == 0) ptx::barrier_expect(&shared.listed_here, uint32_t(sent * sizeof(Candidate)));
                ptx::barrier_wait(&shared.listed_here, 0);
            }
            // the places of a block are those of a warp or more
            static_assert(kPlaces == kThreads && kPlaces / kMostBlocks >= 32);
            const int block = t / places;
            const int to = __reduce_add_sync(~0u, lane < block ? theirs : 0) + t % places;
            if (few && t % places < __shfl_sync(~0u, theirs, block)) {
                const Candidate found = shared.listed[t];
                shared.weighed[to] = {found.key, found.id, weights(of_key(found.key))};
            }
            __syncthreads();
        }
        return few ? sent : -1;
    }

    // How each of n candidates stands among all, in order of id. Each is looked at by several threads.
    __device__ void stand(int n) {
        Shared& shared = blocks.shared;
        const int share = n <= kThreads / 8 ? 8 : n <= kThreads / 4 ? 4 : 2;
        const int i = int(threadIdx.x) / share, first = int(threadIdx.x) % share;
        const Weighed own = shared.weighed[min(i, n - 1)];
        uint32_t places = 0;  // so many have lesser ids, and << 16 so many have greater keys
        uint64_t before = 0;
#pragma unroll 4
        for (int j = first; j < n; j += share) {
            const Weighed other = shared.weighed[j];
            const bool earlier = other.id < own.id, more = other.key > own.key;
            places += uint32_t(earlier) + (uint32_t(more) << 16);
            before += (more | ((other.key == own.key) & earlier)) ? other.weight : 0;
        }
        for (int step = 1; step < share; step *= 2) {
            places += __shfl_xor_sync(~0u, places, step);
            before += __shfl_xor_sync(~0u, before, step);
        }
        if (first == 0 && i < n) {
            const bool kept = top_k() == 0 || int(places >> 16) < top_k();
            shared.ordered[places & 0xffff] = {kept ? own.weight : 0, before, own.key, own.id};
        }
        __syncthreads();
    }

    // Filters and draws among all that can be kept, by one warp.
    __device__ void finish(int row, int n) {
        stand(n);
        if (threadIdx.x >= 32) return;
        const Ordered* ordered = blocks.shared.ordered;
        const int lane = int(threadIdx.x), each_has = (n + 31) / 32;
        const int from = min(lane * each_has, n), upto = min(from + each_has, n);
        const bool by_p = top_p() < 1.0f;
        uint64_t target = ~uint64_t(0);
        if (by_p) {
            uint64_t sum = 0;
            for (int i = from; i < upto; ++i) sum += ordered[i].weight;
            target = share_of(Sum::of(sum));
        }
        uint32_t end_key = 0;
        int32_t end_id = 0;
        const auto measure = [&](int i) {
            const Ordered& one = ordered[i];
            const bool active = one.key > end_key || (one.key == end_key && one.id < end_id);
            return active && one.weight >= floor() ? one.weight : 0;
        };
        for (uint32_t draw = 0;; ++draw) {
            uint64_t sum = 0;
            for (int i = from; i < upto; ++i) sum += measure(i);
            const uint64_t running = scan_warp(sum);
            const uint64_t aim = __umul64hi(random(draw), __shfl_sync(~0u, running, 31));
            const int in = __ffs(__ballot_sync(~0u, running > aim)) - 1;
            int drawn = 0;
            if (lane == in) {
                uint64_t passed = running - sum;
                drawn = from;
                while ((passed += measure(drawn)) <= aim) ++drawn;
            }
            const Ordered found = ordered[__shfl_sync(~0u, drawn, in)];
            if (found.before < target) {
                if (lane == 0) choose(row, found.id);
                return;
            }
            end_key = found.key;
            end_id = found.id;
        }
    }
};

}  // namespace trtllm::sampling
