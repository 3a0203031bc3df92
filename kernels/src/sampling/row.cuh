// A row of logits spread over the thread blocks of a cluster, and how these talk to each other: a word of each to all, by
// asynchronous stores that complete on the receiver's barrier; what is larger is read from its owner's shared memory after
// a barrier of the cluster.
#pragma once

#include <cooperative_groups.h>

#include "ptx.cuh"
#include "trtllm_kernels/sampling.h"
#include "weights.cuh"

namespace trtllm::sampling {

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / 32;
constexpr int kBins = 256;
constexpr int kListed = kThreads / 2;  // elements that one block decides alone, by two threads each or more
constexpr int kPlaces = 2 * kListed;   // for them, of which each block has its share
constexpr int kMaxima = 16 * kWarps;  // a row's elements in so many groups, of which all blocks know the largest
constexpr int kMostBlocks = 16;
constexpr int kSlotStep = 4 * kThreads;  // slots that a block visits at a time

// The chosen token is counted, the request goes a step on.
__device__ __forceinline__ void advance(const trtllm_sampling_params& p, int row, int id) {
    if (p.steps != nullptr) ++p.steps[row];
    if (p.counts != nullptr) {
        int16_t& count = p.counts[row * p.counts_stride + id];
        if ((count & 0x7fff) != 0x7fff) ++count;
    }
}

// What a row is read from; in shared memory, since it is needed once, or (a row too long to be kept) seldom.
struct Source {
    const int16_t* counts;  // NULL where the row has no penalties
    float repetition, frequency, presence;
    // on their way while the row is read
    int32_t top_k;
    float top_p, min_p;
    uint32_t step;
    int64_t seed;

    __device__ __forceinline__ float penalized(float x, int16_t count) const {
        x += 0.0f;  // -0 becomes 0
        if (count == 0) return x;
        x = x > 0.0f ? __fdiv_rn(x, repetition) : __fmul_rn(x, repetition);
        const int generated = count & 0x7fff;
        x = __fsub_rn(x, __fmul_rn(frequency, float(generated)));
        if (generated > 0) x = __fsub_rn(x, presence);
        return x + 0.0f;
    }
};

struct alignas(8) Candidate {
    uint32_t key;
    int32_t id;
};
struct alignas(16) Weighed {
    uint32_t key;
    int32_t id;
    uint64_t weight;
};

// One of those, its place in order of id: what it weighs if top-k keeps it, and the weight before it in top-p's order.
struct alignas(8) Ordered {
    uint64_t weight, before;
    uint32_t key;
    int32_t id;
};

struct alignas(16) Shared {  // what follows it is read in vectors too
    alignas(16) uint32_t maxima[kMaxima];
    alignas(16) Weighed weighed[kListed];
    union {  // of the first block: what others send, and what becomes of it
        Candidate listed[kPlaces];
        Ordered ordered[kListed];
    };
    uint32_t counts[kBins];   // of this block's elements in each bin
    uint32_t sums[2][kBins];  // of all blocks', where this block has charge of a bin; in turn
    uint64_t posted[2][kMostBlocks];
    uint64_t warps[2][kWarps];
    uint32_t scanned[kBins / 32];
    // barriers: a word of each block has come (in turn), the maxima of all have, candidates have
    uint64_t words_here[2], maxima_here, listed_here;
    Source source;
    uint64_t floor, random;
    uint32_t above;
    int32_t reaching[4 * kWarps];
    int32_t taken;  // places in the list
    int32_t bin;
};

// Over the lanes of a warp; by instructions made for words of 32 bits.
struct Sum {
    __device__ static uint64_t of(uint64_t x) {
        constexpr uint32_t kPart = (1u << 22) - 1;
        const uint32_t low = __reduce_add_sync(~0u, uint32_t(x) & kPart);
        const uint32_t mid = __reduce_add_sync(~0u, uint32_t(x >> 22) & kPart);
        const uint32_t high = __reduce_add_sync(~0u, uint32_t(x >> 44));
        return (uint64_t(high) << 44) + (uint64_t(mid) << 22) + low;
    }
};
struct Largest {
    __device__ static uint64_t of(uint64_t x) {
        const uint32_t high = __reduce_max_sync(~0u, uint32_t(x >> 32));
        return uint64_t(high) << 32 | __reduce_max_sync(~0u, uint32_t(x >> 32) == high ? uint32_t(x) : 0u);
    }
};

template <typename Word>
__device__ __forceinline__ Word scan_warp(Word x) {
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
        const Word other = __shfl_up_sync(~0u, x, step);
        if (threadIdx.x % 32 >= step) x += other;
    }
    return x;
}

// The blocks of a row. Below compute capability 9.0 a row has one.
struct Blocks {
    Shared& shared;
    int rank, count;
    uint32_t exchanges = 0, warp_turn = 0;

    // False where the compiler can know it: below compute capability 9.0 no block can send to another.
    __device__ __forceinline__ bool spread() const {
#if __CUDA_ARCH__ >= 900
        return count > 1;
#else
        return false;
#endif
    }
    // Barriers ready, and everybody told so; `started` waits for the others.
    __device__ void start() const {
#if __CUDA_ARCH__ >= 900
        if (!spread()) return;
        if (threadIdx.x == 0) {
            ptx::barrier_init(&shared.words_here[0], 1);
            ptx::barrier_init(&shared.words_here[1], 1);
            ptx::barrier_init(&shared.maxima_here, 1);
            ptx::barrier_init(&shared.listed_here, 1);
            ptx::barrier_init_fence();
            ptx::barrier_expect(&shared.maxima_here, uint32_t(sizeof(shared.maxima)));
        }
        cooperative_groups::this_cluster().barrier_arrive();
#endif
    }
    __device__ void started() const {
#if __CUDA_ARCH__ >= 900
        if (spread()) cooperative_groups::this_cluster().barrier_wait();
#endif
    }
    __device__ void meet() const {
#if __CUDA_ARCH__ >= 900
        if (spread()) {
            cooperative_groups::this_cluster().sync();
            return;
        }
#endif
        __syncthreads();
    }
    template <typename T>
    __device__ __forceinline__ T* of(T* mine, int other) const {
#if __CUDA_ARCH__ >= 900
        if (spread()) return cooperative_groups::this_cluster().map_shared_rank(mine, other);
#endif
        return mine;
    }

    // Of the row's kMaxima groups, the one that what this thread has read belongs to.
    __device__ int group() const { return rank * (kMaxima / count) + int(threadIdx.x) / (2 * count); }
    __device__ bool group_reaches(uint32_t key) const { return shared.maxima[group()] >= key; }

    // The largest of each thread's elements make those of groups of 2 * count lanes, which after a barrier of the block
    // go to all blocks.
    __device__ void note_largest(uint32_t key) const {
        for (int step = count; step > 0; step /= 2) key = max(key, __shfl_xor_sync(~0u, key, step));
        if (int(threadIdx.x) % (2 * count) == 0) shared.maxima[group()] = key;
    }
    __device__ void post_maxima() const {
        if (!spread()) return;
        started();
        uint4* fours = reinterpret_cast<uint4*>(shared.maxima);
        for (int i = int(threadIdx.x); threadIdx.x < 32 && i < kMaxima / 4; i += 32) {
            uint4* mine = fours + rank * (kMaxima / 4 / count) + i / count;
            ptx::store_in_block(mine, *mine, &shared.maxima_here, uint32_t(i % count));
        }
    }
    __device__ void await_maxima() const {
        if (spread()) ptx::barrier_wait(&shared.maxima_here, 0);
    }

    // A word of each block, to the lanes of every warp; 0 to the lanes beyond. The caller has had a barrier of the block
    // since the exchange before, so that every warp has taken its words.
    __device__ uint64_t exchange(uint64_t mine) {
        const int lane = int(threadIdx.x) % 32;
        if (!spread()) return lane == 0 ? mine : 0;
        const uint32_t turn = exchanges % 2, parity = exchanges / 2 % 2;
        ++exchanges;
        if (threadIdx.x < 32) {
            if (lane == 0) ptx::barrier_expect(&shared.words_here[turn], uint32_t(count * sizeof(uint64_t)));
            __syncwarp();
            if (lane < count) {
                ptx::store_in_block(&shared.posted[turn][rank], mine, &shared.words_here[turn], uint32_t(lane));
            }
        }
        ptx::barrier_wait(&shared.words_here[turn], parity);
        return lane < count ? shared.posted[turn][lane] : 0;
    }

    // Over the row; every thread gets the result.
    template <typename Op>
    __device__ uint64_t over_row(uint64_t x) {
        const int lane = int(threadIdx.x) % 32;
        x = Op::of(x);
        uint64_t* words = next_words();
        if (lane == 0) words[threadIdx.x / 32] = x;
        __syncthreads();
        x = Op::of(lane < kWarps ? words[lane] : 0);
        return spread() ? Op::of(exchange(x)) : x;
    }
    // A word for each warp; with one barrier a use.
    __device__ uint64_t* next_words() {
        uint64_t* words = shared.warps[warp_turn];
        warp_turn ^= 1;
        return words;
    }
};

// Where a block finds its part of the row: `slots` floats, a multiple of kSlotStep, in shared memory (or wherever `fetch`
// of the row takes them from). Absent elements are negative infinity. Slots are in order of id.
struct Part {
    float* values;
    int first_id, slots;
};

// Which of kBins an element falls into, falling with its value; -1 for none.
struct Binning {
    uint32_t least, most;  // keys that take part
    bool linear;
    float top, scale;
    int shift;
    __device__ __forceinline__ int operator()(float x) const {
        const uint32_t key = key_of(x);
        if (key < least || key > most) return -1;
        // top - x overflowing, or a scale of infinity or 0, still gives bins that do not rise with x
        if (linear) return int(fminf(__fmul_rn(__fsub_rn(top, x), scale), float(kBins - 1)));
        return int((most - key) >> shift);
    }
};

__device__ __forceinline__ Binning by_key(uint32_t least, uint32_t most) {
    const int bits = 32 - __clz(most - least);
    return {least, most, false, 0.0f, 0.0f, bits > 8 ? bits - 8 : 0};
}

// The bin in which the running count reaches a target, kBins where none does; the count of all before it.
struct Reached {
    int bin;
    uint32_t above;
};

}  // namespace trtllm::sampling
