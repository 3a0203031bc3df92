// Attention of the context phase on Hopper: tensor copies, asynchronous products, warpgroups with roles.
//
// A persistent block walks over tiles of queries of one head, or of several heads that share keys where there are few
// queries. One thread of its first warpgroup copies query, key and value tiles into shared memory; two other warpgroups
// own 64 queries each. Such a warpgroup issues the next tile's scores and this tile's weighted sum of values together,
// and works out the next weights while the tensor cores run. Named barriers let one warpgroup's products run while the
// other is at its exponentials.
// Source: Shah et al. 2024, "FlashAttention-3: Fast and Accurate Attention with Asynchrony and Low-precision".
//
// Tried on an H100 and slower: products that go on across tiles of queries (4 to 7 %), shrinking sums only where the
// maximum grew by much, part of the exponentials as polynomials, three computing warpgroups for heads of 64.
#pragma once

#include "fmha_hopper_consume.cuh"
#include "fmha_hopper_produce.cuh"

namespace trtllm::fmha {

template <typename T, int D, bool Extras>
__global__ void __launch_bounds__(HopperShape<D>::kThreads, 1) hopper_kernel(const __grid_constant__ HopperArguments a) {
#if defined(TRTLLM_SM90A)
    using Shape = HopperShape<D>;
    constexpr int kStages = Shape::kStages;
    extern __shared__ unsigned char shared[];
    __shared__ Barriers<kStages> barriers;
    // the swizzle counts in atoms of 1024 bytes
    unsigned char* const q_tile = shared + (1024 - ptx::shared_address(shared) % 1024) % 1024;
    unsigned char* const k_tile = q_tile + Shape::kQueryBytes;
    unsigned char* const v_tile = k_tile + kStages * Shape::kStageBytes;
    if (threadIdx.x == 0) {
        ptx::barrier_init(&barriers.q_full, 1);
        ptx::barrier_init(&barriers.q_empty, Shape::kGroups);
        ptx::barrier_init(&barriers.tile_full, 1);
        // every thread says itself that it has read `tile`
        ptx::barrier_init(&barriers.tile_empty, 128 * Shape::kGroups);
        for (int i = 0; i < kStages; ++i) {
            ptx::barrier_init(&barriers.k_full[i], 1);
            ptx::barrier_init(&barriers.v_full[i], 1);
            ptx::barrier_init(&barriers.k_empty[i], Shape::kGroups);
            ptx::barrier_init(&barriers.v_empty[i], Shape::kGroups);
        }
        ptx::barrier_init_fence();
    }
    __syncthreads();
    if (a.p.pdl) ptx::wait_for_previous_kernel();
    const int group = int(threadIdx.x) / 128 - 1;
    if (group < 0) {
        give_registers<40>();
        if (threadIdx.x == 0) produce<D>(a, q_tile, k_tile, v_tile, barriers);
    } else {
        take_registers<232>();
        consume<T, D, Extras>(a, q_tile, k_tile, v_tile, barriers, group);
    }
#endif
}

}  // namespace trtllm::fmha
