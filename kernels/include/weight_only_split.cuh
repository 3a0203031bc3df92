// Weight-only products of tens to hundreds of tokens on Hopper: 64 kGroups rows of weights x kTokens tokens a block, K split over
// the blocks of a cluster and added up through their shared memory in a fixed order.
//
// A producer warp copies packed stripes and (swizzled) activations; two warpgroups turn 64 rows each into the first operand
// of wgmma in registers, so that weights cross shared memory once and packed. Blocks of two such warpgroups share a multiprocessor by two: while one
// converts or stores, the other one's products run; blocks of four have it alone. Where activations would cost more of the L2 cache's bandwidth than
// weights, blocks of the cluster with the same part of K copy a share of them each, to all (multicast).
#pragma once

#include "weight_only_tensor_launch.hpp"
#include "weight_only_tile.cuh"
#include "weight_only_wgmma.cuh"

namespace trtllm::weight_only {

template <int kTokens, int kGroups>
struct SplitShape {
    static constexpr int kRows = 64 * kGroups;
    static constexpr int kStripes = kRows / 16;
    static constexpr int kBlocks = 4 / kGroups;  // that share a multiprocessor
    static constexpr int kConsumers = 128 * kGroups;
    static constexpr int kThreads = kConsumers + 128;  // a warpgroup to produce: registers move by warpgroups
    // What a block starts with (96 and 80 registers a thread for 5 and 3 warpgroups), divided anew.
    static constexpr int kProducerRegisters = 32;
    static constexpr int kConsumerRegisters = kGroups == 4 ? 112 : 104;
    static_assert(128 * (kProducerRegisters + kGroups * kConsumerRegisters) == kThreads * (kGroups == 4 ? 96 : 80),
                  "setmaxnreg would wait for ever");
    static constexpr int kPitch = kRows + 4;  // of the sums in shared memory, in floats: conflict-free writes
    static constexpr int kTokenBytes = kTokens * kStageDepth * 2;
    // Steps of 16 inputs converted at a time, while the ones before are multiplied; 128 tokens leave few registers.
    static constexpr int batch(Weight weight) { return kTokens <= 64 ? 4 : weight == Weight::kInt4 ? 2 : 1; }
    static constexpr int kMaxSlots = 8;
    static constexpr int kMaxShared = (kBlocks == 1 ? 227 : 113) * 1024;

    static constexpr int slot_bytes(int stripe_bytes) {
        return kTokenBytes + (kStripes * stripe_bytes + 1023) / 1024 * 1024;
    }
    static constexpr int slots(int stripe_bytes) {
        const int fit = (kMaxShared - 2048) / slot_bytes(stripe_bytes);
        return fit < kMaxSlots ? fit : kMaxSlots;
    }
    // 1024 to align, 1024 for the barriers, and room for the sums in the slots.
    static constexpr int shared_bytes(int stripe_bytes) {
        const int ring = slots(stripe_bytes) * slot_bytes(stripe_bytes), sums = kTokens * kPitch * 4;
        return 2048 + (ring > sums ? ring : sums);
    }
};

template <typename T, Weight kWeight, int kTokens, int kGroups>
__global__ void __launch_bounds__(SplitShape<kTokens, kGroups>::kThreads, SplitShape<kTokens, kGroups>::kBlocks)
    split_kernel(const __grid_constant__ CUtensorMap x_map, const __grid_constant__ CUtensorMap weight_map,
                 const __grid_constant__ TensorArguments a, const __grid_constant__ SplitPlan plan) {
#ifdef TRTLLM_SM90A
    using Shape = SplitShape<kTokens, kGroups>;
    extern __shared__ unsigned char raw[];
    unsigned char* base = raw + ((1024 - (ptx::shared_address(raw) & 1023)) & 1023);
    uint64_t* full = reinterpret_cast<uint64_t*>(base);
    uint64_t* empty = full + Shape::kMaxSlots;
    unsigned char* ring = base + 1024;

    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int cluster_size = plan.share * plan.split;
    const int rank = int(cluster_rank()), part = rank / plan.share, sharer = rank % plan.share;
    const int cluster = int(blockIdx.x) / cluster_size;
    const int token0 = cluster % plan.token_tiles * kTokens;
    const int row0 = (cluster / plan.token_tiles * plan.share + sharer) * Shape::kRows;
    const int first = int(int64_t(a.stages) * part / plan.split);
    const int count = int(int64_t(a.stages) * (part + 1) / plan.split) - first;
    const int slot_bytes = Shape::slot_bytes(a.stripe_bytes), slots = Shape::slots(a.stripe_bytes);

    const int early = count < slots ? count : slots;
    const auto copy_weights = [&](int i, int slot) {
        ptx::barrier_expect(full + slot, uint32_t(Shape::kTokenBytes + Shape::kStripes * a.stripe_bytes));
        copy_box(ring + slot * slot_bytes + Shape::kTokenBytes, weight_map, (first + i) * (a.stripe_bytes / 8),
                 row0 / 16, full + slot, kEvictFirst);
    };
    if (threadIdx.x == Shape::kConsumers) {
        prefetch_map(weight_map);
        prefetch_map(x_map);
        for (int i = 0; i < slots; ++i) {
            ptx::barrier_init(full + i, 1);
            ptx::barrier_init(empty + i, 4 * kGroups * plan.share);
        }
        ptx::barrier_init_fence();
        // weights do not depend on the kernel before this one, and come to this block alone: nobody need be waited for
        for (int i = 0; i < early; ++i) copy_weights(i, i);
    }
    if (plan.share > 1) {
        cluster_sync();  // other blocks copy into this one and arrive at its barriers
    } else {
        __syncthreads();
    }

    if (warp >= Shape::kConsumers / 32) {
        give_registers<Shape::kProducerRegisters>();
        if (threadIdx.x == Shape::kConsumers) {
            const int share_tokens = kTokens / plan.share;
            const uint16_t mask = uint16_t(((1 << plan.share) - 1) << (part * plan.share));
            const auto copy_tokens = [&](int i, int slot) {
                unsigned char* to = ring + slot * slot_bytes + sharer * share_tokens * 128;
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    const int at = (first + i) * kStageDepth + 64 * half;
                    if (plan.share > 1) {
                        copy_box_multicast(to + half * kTokens * 128, x_map, at, token0 + sharer * share_tokens, full + slot,
                                           mask, kEvictLast);
                    } else {
                        copy_box(to + half * kTokens * 128, x_map, at, token0, full + slot, kEvictLast);
                    }
                }
            };
            if (a.pdl) {
                ptx::let_next_kernel_start();
                ptx::wait_for_previous_kernel();
            }
            for (int i = 0; i < early; ++i) copy_tokens(i, i);
            int slot = 0, parity = 0;
            for (int i = early; i < count; ++i) {
                wait(empty + slot, parity);
                copy_weights(i, slot);
                copy_tokens(i, slot);
                if (++slot == slots) slot = 0, parity ^= 1;
            }
        }
        __syncwarp();
        // the consumers' two: sums written, sums read
        if (cluster_size > 1) {
            cluster_sync();
            cluster_sync();
        }
    } else {
        take_registers<Shape::kConsumerRegisters>();
        constexpr int kBatch = Shape::batch(kWeight), kBatches = 8 / kBatch;
        // with few tokens a product waits for the one before it longer than it takes: two chains of sums
        constexpr int kChains = kTokens <= 32 && kWeight == Weight::kInt4 ? 2 : 1;
        float sums[kChains][kTokens / 2];
        uint32_t fragments[2][kBatch][4];
        StripeTile<T, kWeight> tile;
        int slot = 0, parity = 0, before = 0;
        for (int i = 0; i < count; ++i) {
            unsigned char* here = ring + slot * slot_bytes;
            wait(full + slot, parity);
            tile.load(here + Shape::kTokenBytes + warp * a.stripe_bytes, lane);
            const uint64_t tokens = descriptor(here);
            const auto batch = [&](auto which) {
                constexpr int kWhich = decltype(which)::value;
                auto& f = fragments[kWhich % 2];
                const auto step = [&](auto s) {
                    constexpr int kStep = kWhich * kBatch + decltype(s)::value;
                    if constexpr (kStep % 2 == 0) tile.select(kStep / 2, a, lane);
                    tile.template fragment<kStep>(f[decltype(s)::value]);
                };
                unroll<kBatch>(step);
                pin(f);
                wgmma_fence();
#pragma unroll
                for (int s = 0; s < kBatch; ++s) {
                    const int at = kWhich * kBatch + s;
                    Wgmma<T, kTokens>::run(sums[s % kChains], f[s], tokens + at / 4 * (kTokens * 128 / 16) + at % 4 * 2,
                                           i > 0 || at >= kChains);
                }
                wgmma_commit();
                wgmma_wait<1>();
                if constexpr (kWhich == 0) {
                    // the products of the stage before are done: its slot may be filled again, in every block that fills it
                    if (i > 0 && lane < plan.share) arrive_in(empty + before, part * plan.share + lane);
                }
            };
            unroll<kBatches>(batch);
            before = slot;
            if (++slot == slots) slot = 0, parity ^= 1;
        }
        wgmma_wait<0>();
#pragma unroll
        for (int c = 0; c < kChains; ++c) pin(sums[c]);
        if constexpr (kChains == 2) {
#pragma unroll
            for (int j = 0; j < kTokens / 2; ++j) sums[0][j] += sums[1][j];
        }
        // every block's copies into this one have arrived (it waited for each), so the ring can hold the sums
        ptx::named_barrier_sync<Shape::kConsumers>(1);
        float* to = reinterpret_cast<float*>(ring) + warp * 16 + lane / 4;
#pragma unroll
        for (int j = 0; j < kTokens / 8; ++j) {
            float* at = to + (8 * j + lane % 4 * 2) * Shape::kPitch;
            at[0] = sums[0][4 * j];
            at[Shape::kPitch] = sums[0][4 * j + 1];
            at[8] = sums[0][4 * j + 2];
            at[Shape::kPitch + 8] = sums[0][4 * j + 3];
        }

        if (cluster_size > 1) {
            cluster_sync();
        } else {
            ptx::named_barrier_sync<Shape::kConsumers>(1);
        }
        if (a.pdl) ptx::wait_for_previous_kernel();  // the residual may be its result
        const uint32_t written = ptx::shared_address(ring);
        const auto sum_of = [&](int token, int row) {
            float4 total = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
            for (int p = 0; p < plan.split; ++p) {
                const uint32_t at = written + uint32_t(token * Shape::kPitch + row) * 4;
                const float4 v = load_cluster(address_in(at, uint32_t(p * plan.share + sharer)));
                total.x += v.x, total.y += v.y, total.z += v.z, total.w += v.w;
            }
            return total;
        };
        write_tile<T, kWeight, Shape::kRows>(a, token0, row0, min(kTokens, a.m - token0),
                                             part * Shape::kConsumers + int(threadIdx.x), plan.split * Shape::kConsumers,
                                             sum_of);
        // no block may go while another one reads its sums or arrives at its barriers
        if (cluster_size > 1) cluster_sync();
    }
#endif
}

// The launch of one instance.
template <typename T, Weight kWeight, int kTokens, int kGroups>
cudaError_t launch_split(const HopperLaunch& l) {
    using Shape = SplitShape<kTokens, kGroups>;
    static unsigned long long done_devices = 0;
    const void* kernel = reinterpret_cast<const void*>(split_kernel<T, kWeight, kTokens, kGroups>);
    cudaError_t code = allow_shared(kernel, Shape::kMaxShared, done_devices);
    if (code != cudaSuccess) return code;
    cudaLaunchAttribute attributes[2];
    attributes[0].id = cudaLaunchAttributeClusterDimension;
    attributes[0].val.clusterDim.x = unsigned(l.plan.share * l.plan.split);
    attributes[0].val.clusterDim.y = attributes[0].val.clusterDim.z = 1;
    attributes[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[1].val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(unsigned(l.row_tiles) * unsigned(l.plan.token_tiles) * unsigned(l.plan.split));
    config.blockDim = dim3(Shape::kThreads);
    config.dynamicSmemBytes = Shape::shared_bytes(l.arguments->stripe_bytes);
    config.stream = l.stream;
    config.attrs = attributes;
    config.numAttrs = l.arguments->pdl ? 2 : 1;
    return cudaLaunchKernelEx(&config, split_kernel<T, kWeight, kTokens, kGroups>, *l.x_map, *l.weight_map, *l.arguments, l.plan);
}

template <typename T, Weight kWeight>
cudaError_t launch_split_of(const HopperLaunch& l) {
    switch (l.tokens * 8 + l.groups) {
        case 16 * 8 + 2: return launch_split<T, kWeight, 16, 2>(l);
        case 32 * 8 + 2: return launch_split<T, kWeight, 32, 2>(l);
        case 64 * 8 + 2: return launch_split<T, kWeight, 64, 2>(l);
        case 16 * 8 + 4: return launch_split<T, kWeight, 16, 4>(l);
        case 32 * 8 + 4: return launch_split<T, kWeight, 32, 4>(l);
        case 64 * 8 + 4: return launch_split<T, kWeight, 64, 4>(l);
        default: return launch_split<T, kWeight, 128, 4>(l);
    }
}

}  // namespace trtllm::weight_only
