// A row of logits spread over the thread blocks of a cluster, and what they do to it together: reductions, histograms,
// finding an element by the sum before it. Each exchange is one barrier: the blocks write to their own shared memory, meet,
// and read from everybody's; buffers alternate, so that the next exchange needs no barrier to start.
#pragma once

#include <cooperative_groups.h>

#include "trtllm_kernels/sampling.h"
#include "weights.cuh"

namespace trtllm::sampling {

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / 32;
constexpr int kBins = 256;
constexpr int kListed = 4 * kThreads;  // elements that one block finishes alone
constexpr uint64_t kWithoutLimit = ~uint64_t(0);  // the largest element of a row with NaN or positive infinity

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
    const void* logits;
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

struct alignas(16) Shared {  // what follows it is read in vectors too
    alignas(16) float listed[kListed];
    Source source;
    int32_t ids[kListed];
    uint32_t low[2][kBins], high[2][kBins];    // sums of each bin, 64 bits
    uint32_t least[2][kBins], most[2][kBins];  // keys in each bin
    uint64_t posted[2];
    uint64_t warps[2][kWarps];
    uint64_t scanned[kBins / 32];
    uint64_t above;
    int32_t bin;
    int32_t last_tie;
};

struct Sum {
    __device__ static uint64_t of(uint64_t a, uint64_t b) { return a + b; }
};
struct Largest {
    __device__ static uint64_t of(uint64_t a, uint64_t b) { return a > b ? a : b; }
};

template <typename Op>
__device__ __forceinline__ uint64_t over_warp(uint64_t x) {
#pragma unroll
    for (int step = 16; step > 0; step /= 2) x = Op::of(x, __shfl_xor_sync(~0u, x, step));
    return x;
}

// For sums below 2^48: two sums of halves, by instructions made for it.
__device__ __forceinline__ uint64_t sum_of_warp(uint64_t x) {
    const uint32_t low = __reduce_add_sync(~0u, uint32_t(x) & 0xffffffu);
    return (uint64_t(__reduce_add_sync(~0u, uint32_t(x >> 24))) << 24) + low;
}

__device__ __forceinline__ uint64_t scan_warp(uint64_t x) {
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
        const uint64_t other = __shfl_up_sync(~0u, x, step);
        if (threadIdx.x % 32 >= step) x += other;
    }
    return x;
}

// The blocks of a row. Below compute capability 9.0 a row has one.
struct Blocks {
    Shared& shared;
    int rank, count;
    int turn = 0, warp_turn = 0;

    __device__ void meet() const {
#if __CUDA_ARCH__ >= 900
        if (count > 1) {
            cooperative_groups::this_cluster().sync();
            return;
        }
#endif
        __syncthreads();
    }
    template <typename T>
    __device__ __forceinline__ T* of(T* mine, int other) const {
#if __CUDA_ARCH__ >= 900
        if (count > 1) return cooperative_groups::this_cluster().map_shared_rank(mine, other);
#endif
        return mine;
    }

    // Over this block; every thread gets the result.
    template <typename Op>
    __device__ uint64_t over_block(uint64_t x) {
        x = over_warp<Op>(x);
        uint64_t* words = shared.warps[warp_turn];
        warp_turn ^= 1;
        if (threadIdx.x % 32 == 0) words[threadIdx.x / 32] = x;
        __syncthreads();
        return over_warp<Op>(threadIdx.x % 32 < kWarps ? words[threadIdx.x % 32] : 0);
    }
    // A word of each block, to the lanes of every warp; 0 to the lanes beyond.
    __device__ uint64_t exchange(uint64_t mine) {
        if (threadIdx.x == 0) shared.posted[turn] = mine;
        meet();
        const int lane = threadIdx.x % 32;
        const uint64_t theirs = lane < count ? *of(&shared.posted[turn], lane) : 0;
        turn ^= 1;
        return theirs;
    }
    template <typename Op>
    __device__ uint64_t over_row(uint64_t x) {
        x = over_block<Op>(x);
        return count == 1 ? x : over_warp<Op>(exchange(x));
    }
};

// Where a block finds its part of the row: `slots` floats, a multiple of kListed, in shared memory (or wherever `fetch`
// of the kernel takes them from). Absent elements are negative infinity. Slots are in order of id.
struct Part {
    const float* values;
    const int32_t* ids;  // NULL: first_id + slot
    int first_id, slots;
    __device__ int id(int slot) const { return ids == nullptr ? first_id + slot : ids[slot]; }
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

// The bin in which the running sum reaches `target`, kBins where none does; the sum of all before it.
struct Reached {
    int bin;
    uint64_t above, target;
};

}  // namespace trtllm::sampling
