// How the keys of a whole batch are dealt out to the blocks of one grid.
//
// A pair is a sequence with a kv head (and, where a group has more query rows than a block takes at a time, a part of
// them). Its keys are cut into units. The units of all pairs form one line, which is cut into equal runs, one a block:
// every block has the same work whatever the lengths are, and nobody reads them on the host. A pair that several runs
// share is put together by the block that comes last (see mmha_kernel.cuh). The idea is that of "stream-K" products
// (Osama et al., 2023) applied to flash-decoding.
#pragma once

#include "ptx.cuh"
#include "trtllm_kernels/mmha.h"

namespace trtllm::mmha {

struct Sequence {
    int length;
    int low;    // the first key that some query sees
    int first;  // units [first, first + units)
    int units;

    __device__ __forceinline__ Sequence(const trtllm_mmha_params& p, int b, int unit) {
        length = min(max(p.lengths[b], 0), p.max_length);
        low = p.window > 0 ? max(0, length - p.q_length - p.window + 1) : 0;
        first = low / unit;
        units = (length + unit - 1) / unit - first;
    }
};

__device__ __forceinline__ int warp_sum(int x) {
    for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(~0u, x, step);
    return x;
}

// The runs: the first `longer` blocks have `least` + 1 units, the others up to `blocks` have `least`.
struct Deal {
    int blocks, least, longer;

    __device__ __forceinline__ Deal(int units, int grid) {
        blocks = max(1, min(units, grid));
        least = units / blocks;
        longer = units - least * blocks;
    }
    __device__ __forceinline__ int start(int block) const { return block * least + min(block, longer); }
    __device__ __forceinline__ int owner(int unit) const {
        const int in_longer = longer * (least + 1);
        return unit < in_longer ? unit / (least + 1) : longer + (unit - in_longer) / least;
    }
};

// Into L1, without a wait.
__device__ __forceinline__ void touch(const int32_t* from) {
    [[maybe_unused]] int unused;
    asm volatile("ld.global.ca.b32 %0, [%1];" : "=r"(unused) : "l"(from));
}

// Called by whole warps, each for itself.
__device__ __forceinline__ int total_units(const trtllm_mmha_params& p, int unit) {
    if (p.batch == 1) return Sequence(p, 0, unit).units;
    int sum = 0;
    for (int b = threadIdx.x % 32; b < p.batch; b += 32) sum += Sequence(p, b, unit).units;
    return warp_sum(sum);
}

// The sequence in which unit `at` of one row of pairs (all sequences, one head) lies when each unit counts `heads`
// times: `before` is the number of units in front of the sequence.
__device__ __forceinline__ int find_sequence(const trtllm_mmha_params& p, int unit, int at, int heads, int& before) {
    const int lane = threadIdx.x % 32;
    before = 0;
    for (int from = 0; from < p.batch; from += 32) {
        const int units = from + lane < p.batch ? Sequence(p, from + lane, unit).units * heads : 0;
        int upto = units;
#pragma unroll
        for (int step = 1; step < 32; step *= 2) {
            const int other = __shfl_up_sync(~0u, upto, step);
            if (lane >= step) upto += other;
        }
        const unsigned past = __ballot_sync(~0u, before + upto > at);
        if (past != 0) {
            const int which = __ffs(int(past)) - 1;
            before += __shfl_sync(~0u, upto - units, which);
            return from + which;
        }
        before += __shfl_sync(~0u, upto, 31);
    }
    return p.batch;  // never, for a unit that exists
}

}  // namespace trtllm::mmha
