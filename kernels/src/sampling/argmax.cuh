// The largest logit of each row, where nothing but that is asked for: a pass over the row with few registers, so that
// more of it is on its way, and one exchange between the blocks of a cluster.
#pragma once

#include <cooperative_groups.h>

#include <type_traits>

#include "ptx.cuh"
#include "row.cuh"
#include "trtllm_kernels/sampling.h"

namespace trtllm::sampling {

// NaN where either is.
__device__ __forceinline__ float larger(float a, float b) {
    float c;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(c) : "f"(a), "f"(b));
    return c;
}

// Key and id of the largest; ~0 is the key of NaN and infinity.
struct alignas(8) Found {
    uint32_t key, id;
};

// The least id among equals.
__device__ __forceinline__ Found over_warp(Found mine) {
    const uint32_t key = __reduce_max_sync(~0u, mine.key);
    return {key, __reduce_min_sync(~0u, mine.key == key ? mine.id : ~0u)};
}

template <typename T, int V>
struct alignas(16) LogitPack {
    uint32_t words[4];
    __device__ __forceinline__ float at(int i) const {
        const uint32_t word = words[i * int(sizeof(T)) / 4];
        if constexpr (std::is_same_v<T, float>) return __uint_as_float(word);
        if constexpr (std::is_same_v<T, __nv_bfloat16>) return __uint_as_float(i % 2 ? word & 0xffff0000u : word << 16);
        return __half2float(__ushort_as_half(uint16_t(i % 2 ? word >> 16 : word)));
    }
};

// `Ahead` vectors of each thread are on their way together: the more, the fewer blocks an SM holds.
template <typename T, int Ahead>
__global__ void __launch_bounds__(kThreads, Ahead > 4 ? 2 : 3)
    argmax_kernel(const __grid_constant__ trtllm_sampling_params p) {
    constexpr int V = 16 / int(sizeof(T));
    __shared__ Found warps[kWarps];
    const int ranks = p.cluster, row = int(blockIdx.x) / ranks, rank = int(blockIdx.x) % ranks;
#if __CUDA_ARCH__ >= 900
    __shared__ Found of_blocks[16];
    __shared__ uint64_t all_here;  // of the first block: what each block found has come
    auto cluster = cooperative_groups::this_cluster();
    if (ranks > 1) {
        if (rank == 0 && threadIdx.x == 0) {
            ptx::barrier_init(&all_here, 1);
            ptx::barrier_init_fence();
            ptx::barrier_expect(&all_here, uint32_t(ranks * sizeof(Found)));
        }
        // waited for before the first word goes to the first block, which must have started by then
        cluster.barrier_arrive();
    }
#endif
    ptx::wait_for_previous_kernel();
    ptx::let_next_kernel_start();
    const T* logits = static_cast<const T*>(p.logits) + row * p.logits_stride;
    // vectors start where 16 bytes do, so that rows of odd length are read in vectors too
    const int head = int(-reinterpret_cast<uintptr_t>(logits) % 16 / sizeof(T));
    const int count = max(p.vocab - head, 0) / V, tail = head + count * V;
    const int each = (count + ranks - 1) / ranks, first = rank * each;
    const int vectors = min(each, count - first);

    float best = -INFINITY;
    int where = 0;  // the vector that holds it, or the element of head and tail
    if (rank == 0 && threadIdx.x < min(head, p.vocab)) {
        where = int(threadIdx.x);
        best = float(logits[where]);
    }
    const LogitPack<T, V>* packs = reinterpret_cast<const LogitPack<T, V>*>(logits + head) + first;
    for (int begin = int(threadIdx.x); begin < vectors; begin += Ahead * kThreads) {
        LogitPack<T, V> raw[Ahead];
#pragma unroll
        for (int n = 0; n < Ahead; ++n) {
            if (begin + n * kThreads < vectors) raw[n] = packs[begin + n * kThreads];
        }
#pragma unroll
        for (int n = 0; n < Ahead; ++n) {
            if (begin + n * kThreads >= vectors) continue;
            float top = raw[n].at(0);
#pragma unroll
            for (int i = 1; i < V; ++i) top = larger(top, raw[n].at(i));
            // ids rise, so an equal one is no better
            where = top > best ? head + (first + begin + n * kThreads) * V : where;
            best = larger(best, top);
        }
    }
    if (rank == ranks - 1 && tail + int(threadIdx.x) < p.vocab) {
        const int id = tail + int(threadIdx.x);
        const float x = float(logits[id]);
        where = x > best ? id : where;
        best = larger(best, x);
    }
    Found found = {best == -INFINITY ? 0 : best < INFINITY ? key_of(best + 0.0f) : ~0u, uint32_t(where)};  // -0 becomes 0
    found = over_warp(found);
    const int lane = int(threadIdx.x) % 32;
    // which of the vector: it is still in the first cache
    const int id = int(found.id) + lane;
    const bool equal = lane < V && id < p.vocab && key_of(float(logits[id]) + 0.0f) == found.key;
    found.id += max(__ffs(__ballot_sync(~0u, equal)) - 1, 0);
    if (lane == 0) warps[threadIdx.x / 32] = found;
    __syncthreads();
    if (threadIdx.x < 32) found = over_warp(lane < kWarps ? warps[lane] : Found{0, 0});
#if __CUDA_ARCH__ >= 900
    if (ranks > 1) {
        cluster.barrier_wait();
        if (threadIdx.x == 0) ptx::store_in_block(&of_blocks[rank], found, &all_here, 0);
        if (rank != 0 || threadIdx.x >= 32) return;
        ptx::barrier_wait(&all_here, 0);
        found = over_warp(lane < ranks ? of_blocks[lane] : Found{0, 0});
    }
#endif
    if (threadIdx.x != 0) return;
    const bool bad = found.key == ~0u || found.key < kLeastKey;
    p.tokens[row] = bad ? -1 : int(found.id);
    if (p.advance && !bad) advance(p, row, int(found.id));
}

}  // namespace trtllm::sampling
