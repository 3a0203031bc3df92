// How the keys of a whole batch are dealt out to the blocks of one grid.
//
// A pair is a sequence with a kv head (and, where a group has more query rows than a block takes at a time, a part of
// them). Its keys are cut into units. The units of all pairs form one line, which is cut into equal runs, one a block:
// every block has the same work whatever the lengths are, and nobody reads them on the host. Where all sequences have
// as many units, cuts move to ends of pairs if that makes the longest run hardly longer. A pair that several runs share
// is put together by the block with the last of them (see mmha_parts.cuh). The idea is that of "stream-K" products
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

// The units of a batch: of one pair of each sequence, together; and each sequence's, or 0 where they differ.
struct Units {
    int sum, each;

    // called by whole warps, each for itself
    __device__ __forceinline__ Units(const trtllm_mmha_params& p, int unit) {
        if (p.batch == 1) {
            sum = each = Sequence(p, 0, unit).units;
            return;
        }
        sum = 0;
        int most = 0;
        for (int b = threadIdx.x % 32; b < p.batch; b += 32) {
            const int units = Sequence(p, b, unit).units;
            sum += units;
            most = max(most, units);
        }
        for (int step = 16; step > 0; step /= 2) {
            sum += __shfl_xor_sync(~0u, sum, step);
            most = max(most, __shfl_xor_sync(~0u, most, step));
        }
        each = int64_t(most) * p.batch == sum ? most : 0;
    }
};

// The runs: every `period` units are dealt to `share` blocks, of which the first `longer` have `least` + 1 units and the
// others `least`. Elsewhere than in a uniform batch there is one period.
struct Deal {
    int total, blocks, period, share, least, longer;

    __device__ __forceinline__ Deal(const Units& units, int pairs, int batch, int grid) {
        total = units.sum * pairs;
        blocks = max(1, min(total, grid));
        period = total, share = blocks;
        if (units.each > 0) {
            const int all = pairs * batch, longest = (total + blocks - 1) / blocks;
            if (all <= grid) {  // several blocks a pair
                const int run = (units.each + grid / all - 1) / (grid / all);
                if (nearly(run, longest)) {
                    period = units.each, share = (units.each + run - 1) / run;
                    blocks = all * share;
                }
            } else {  // several pairs a block
                const int run = (all + grid - 1) / grid * units.each;
                if (nearly(run, longest)) {
                    period = run, share = 1;
                    blocks = (total + run - 1) / run;
                }
            }
        }
        least = period / share;
        longer = period - least * share;
    }
    __device__ __forceinline__ int start(int block) const {
        const int whole = block / share, within = block - whole * share;
        return min(total, whole * period + within * least + min(within, longer));
    }
    __device__ __forceinline__ int owner(int unit) const {
        const int whole = unit / max(period, 1), within = unit - whole * period, in_longer = longer * (least + 1);
        return whole * share + (within < in_longer ? within / (least + 1) : longer + (within - in_longer) / least);
    }

  private:
    static __device__ __forceinline__ bool nearly(int run, int longest) { return run - longest <= longest / 16; }
};

// Into L1, without a wait.
__device__ __forceinline__ void touch(const void* from) {
    [[maybe_unused]] int unused;
    asm volatile("ld.global.ca.b32 %0, [%1];" : "=r"(unused) : "l"(from));
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
