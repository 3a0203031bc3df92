// Weight-only products of tens to hundreds of tokens on Hopper: 64 kGroups rows of weights x kTokens tokens a block, K split over
// the blocks of a cluster and added up through their shared memory in a fixed order.
//
// A producer warp copies packed stripes and (swizzled) activations; two or four warpgroups turn 64 rows each into the
// first operand of wgmma in registers, so that weights cross shared memory once and packed. What bounds the kernel is the
// instructions that conversion takes: with few tokens int4 weights are multiplied as whole numbers, and the sums of a group
// are scaled, which are fewer than its weights. Blocks of two such warpgroups share a multiprocessor by two: while one
// converts or stores, the other one's products run; blocks of four have it alone.
#pragma once

#include "cluster_sums.cuh"
#include "weight_only_stripe.cuh"
#include "weight_only_tensor_launch.hpp"
#include "weight_only_wgmma.cuh"

namespace trtllm::weight_only {

template <Weight kWeight, int kTokens, int kGroups, int kShift>
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
    // Whether sums are scaled instead of weights: where a group has fewer of the former.
    static constexpr bool kFold = kWeight == Weight::kInt4 && (kTokens == 16 || (kTokens == 32 && kShift > 0));
    // Steps of 16 inputs converted at a time, while the ones before are multiplied; 128 tokens leave few registers.
    static constexpr int kBatch = kFold && kShift == 0 ? 2 : kTokens <= 64 ? 4 : 1;
    static constexpr int kTokenBytes = kTokens * kStageDepth * 2;
    static constexpr int kEights = kTokens / 8, kItems = kStripes * kEights;
    // parts of sums come to a place of their own where that is small, else to the ring when nobody reads it any more
    static constexpr bool kApart = kTokens == 16;
    static constexpr int kMaxSlots = 8;
    static constexpr int kMaxShared = (kBlocks == 1 ? 227 : 113) * 1024;

    static constexpr int slot_bytes(int stripe_bytes) {
        return kTokenBytes + (kStripes * stripe_bytes + 1023) / 1024 * 1024;
    }
    static constexpr int slots(int stripe_bytes) {
        const int fit = (kMaxShared - 2048 - (kApart ? sums::received_bytes(kItems) : 0)) / slot_bytes(stripe_bytes);
        return fit < kMaxSlots ? fit : kMaxSlots;
    }
    // 1024 to align, 1024 for the barriers
    static constexpr int shared_bytes(int stripe_bytes) {
        const int ring = slots(stripe_bytes) * slot_bytes(stripe_bytes), received = sums::received_bytes(kItems);
        return 2048 + (kApart ? ring + received : ring > received ? ring : received);
    }
};

/// From sums to outputs, for an item of 16 rows by 8 tokens as the matrix unit holds it.
template <typename T, Weight kWeight>
class ItemEnd {
public:
    /// Asks for everything the end needs besides the sums.
    __device__ __forceinline__ ItemEnd(const TensorArguments& arguments, int first_row, int first_token, int lane)
        : a(arguments), row0(first_row), token0(first_token), lane(lane) {
        const int row = row0 + lane / 4, token = token0 + lane % 4 * 2;
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            factor[h] = row_factor<T, kWeight>(a, row + 8 * h);
            bias[h] = row_bias<T>(a, row + 8 * h);
        }
        if (a.residual == nullptr) return;
#pragma unroll
        for (int e = 0; e < (a.gate ? 2 : 4); ++e) {
            const int column = a.gate ? row0 / 2 + lane / 4 : row + e / 2 * 8;
            if (token + e % 2 < a.m && column < a.outputs) {
                residual[e] = float(static_cast<const T*>(a.residual)[(token + e % 2) * a.residual_stride + column]);
            }
        }
    }
    __device__ __forceinline__ void write(float s0, float s1, float s2, float s3) const {
        const float v[4] = {s0 * factor[0] + bias[0], s1 * factor[0] + bias[0], s2 * factor[1] + bias[1],
                            s3 * factor[1] + bias[1]};
        if (a.gate) {
            write_eight(gated(a.gate, v[0], v[2]) + residual[0], gated(a.gate, v[1], v[3]) + residual[1], row0 / 2);
        } else {
            write_eight(v[0] + residual[0], v[1] + residual[1], row0);
            write_eight(v[2] + residual[2], v[3] + residual[3], row0 + 8);
        }
    }

private:
    const TensorArguments& a;
    int row0, token0, lane;
    float factor[2], bias[2], residual[4] = {};

    // 8 columns from `first` on: a pair of neighbours of one token for each lane
    __device__ __forceinline__ void write_eight(float x, float y, int first) const {
        const uint32_t pair = sums::transposed(pack_pair<T>(x, y));
        const int token = token0 + lane / 4, column = first + lane % 4 * 2;
        if (token >= a.m || column >= a.outputs) return;
        uint16_t* out = static_cast<uint16_t*>(a.out) + token * a.out_stride + column;
        if (a.vector && column + 1 < a.outputs) {
            *reinterpret_cast<uint32_t*>(out) = pair;
        } else {
            out[0] = uint16_t(pair);
            if (column + 1 < a.outputs) out[1] = uint16_t(pair >> 16);
        }
    }
};

// A consumer warp's sums over `count` stages of its block's ring.
template <typename T, Weight kWeight, int kTokens, int kGroups, int kShift>
__device__ __forceinline__ void sum_stages(float (&sums)[kTokens / 2], const TensorArguments& a, unsigned char* ring,
                                           uint64_t* full, uint64_t* empty, int count) {
    using Shape = SplitShape<kWeight, kTokens, kGroups, kShift>;
    constexpr bool kFold = Shape::kFold;
    constexpr int kBatch = Shape::kBatch, kBatches = 8 / kBatch;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int slot_bytes = Shape::slot_bytes(a.stripe_bytes), slots = Shape::slots(a.stripe_bytes);
    Stripe<T, kWeight, kShift, !kFold> stripe(
        ptx::shared_address(ring) + Shape::kTokenBytes + warp * a.stripe_bytes, a.has_zero, lane);
    uint32_t fragments[2][kBatch][4];
    [[maybe_unused]] float group[kTokens / 2] = {};
    [[maybe_unused]] float2 last = {0.0f, 0.0f};  // factors of the group that `group` is of
    const auto scale = [&](float2 factor) {
#pragma unroll
        for (int j = 0; j < kTokens / 2; ++j) sums[j] += group[j] * (j / 2 % 2 ? factor.y : factor.x);
    };
    if constexpr (kFold) {
#pragma unroll
        for (int j = 0; j < kTokens / 2; ++j) sums[j] = 0.0f;
    }
    int slot = 0, parity = 0, before = 0, offset = 0;
    for (int i = 0; i < count; ++i) {
        wait(full + slot, parity);
        stripe.template load<0>(offset);
        const uint64_t tokens = descriptor(ring + slot * slot_bytes);
        const auto batch = [&](auto which) {
            constexpr int kWhich = decltype(which)::value;
            auto& f = fragments[kWhich % 2];
            const auto step = [&](auto s) {
                constexpr int kStep = kWhich * kBatch + decltype(s)::value;
                if constexpr (kStep == 4) stripe.template load<1>(offset);
                if constexpr (kStep % 2 == 0) stripe.template select<kStep / 2>();
                stripe.template fragment<kStep>(f[decltype(s)::value]);
            };
            unroll<kBatch>(step);
            pin(f);
            [[maybe_unused]] constexpr int kPer = kFold ? (2 << kShift) / kBatch : 1;  // batches a group
            if constexpr (kFold) {
                wgmma_wait<0>();
                pin(group);
                if constexpr (kWhich == 0) {
                    scale(last);
                } else if constexpr (kWhich % kPer == 0) {
                    scale(stripe.template factor<kWhich / kPer - 1>());
                }
                pin(group);
            }
            wgmma_fence();
#pragma unroll
            for (int s = 0; s < kBatch; ++s) {
                const int at = kWhich * kBatch + s;
                const uint64_t b = tokens + at / 4 * (kTokens * 128 / 16) + at % 4 * 2;
                if constexpr (kFold) {
                    Wgmma<T, kTokens>::run(group, f[s], b, kWhich % kPer != 0 || s > 0);
                } else {
                    Wgmma<T, kTokens>::run(sums, f[s], b, i > 0 || at > 0);
                }
            }
            wgmma_commit();
            if constexpr (!kFold) wgmma_wait<1>();
            // the products of the stage before are done: its slot may be filled again
            if (kWhich == 0 && i > 0 && lane == 0) ptx::barrier_arrive(empty + before);
        };
        unroll<kBatches>(batch);
        if constexpr (kFold) last = stripe.template factor<(4 >> kShift) - 1>();
        before = slot;
        offset += slot_bytes;
        if (++slot == slots) slot = 0, parity ^= 1, offset = 0;
    }
    wgmma_wait<0>();
    if constexpr (kFold) {
        pin(group);
        scale(last);
    } else {
        pin(sums);
    }
}

template <typename T, Weight kWeight, int kTokens, int kGroups, int kShift>
__global__ void __launch_bounds__(SplitShape<kWeight, kTokens, kGroups, kShift>::kThreads,
                                  SplitShape<kWeight, kTokens, kGroups, kShift>::kBlocks)
    split_kernel(const __grid_constant__ CUtensorMap x_map, const __grid_constant__ CUtensorMap weight_map,
                 const __grid_constant__ TensorArguments a, const __grid_constant__ SplitPlan plan) {
#ifdef TRTLLM_SM90A
    using Shape = SplitShape<kWeight, kTokens, kGroups, kShift>;
    extern __shared__ unsigned char raw[];
    unsigned char* base = raw + ((1024 - (ptx::shared_address(raw) & 1023)) & 1023);
    uint64_t* full = reinterpret_cast<uint64_t*>(base);
    uint64_t* empty = full + Shape::kMaxSlots;
    uint64_t* arrived = empty + Shape::kMaxSlots;
    unsigned char* ring = base + 1024;

    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const sums::Shares<Shape::kItems> shares = {plan.split, plan.split > 1 ? int(cluster_rank()) : 0};
    const int cluster = int(blockIdx.x) / plan.split;
    const int token0 = cluster % plan.token_tiles * kTokens;
    const int row0 = cluster / plan.token_tiles * Shape::kRows;
    const int first = int(int64_t(a.stages) * shares.rank / plan.split);
    const int count = int(int64_t(a.stages) * (shares.rank + 1) / plan.split) - first;
    const int slot_bytes = Shape::slot_bytes(a.stripe_bytes), slots = Shape::slots(a.stripe_bytes);
    const uint32_t received = ptx::shared_address(Shape::kApart ? ring + slots * slot_bytes : ring);

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
            ptx::barrier_init(empty + i, 4 * kGroups);
        }
        ptx::barrier_init(arrived, 1);
        ptx::barrier_init_fence();
        if (plan.split > 1) ptx::barrier_expect(arrived, shares.bytes());
        // weights do not depend on the kernel before this one
        for (int i = 0; i < early; ++i) copy_weights(i, i);
    }
    __syncthreads();
    // others may send once they have waited for this
    if (plan.split > 1) sums::arrive_relaxed();
    const auto wait_to_send = [&] {
        sums::wait_for_cluster();
        if (!Shape::kApart) {
            // and once nobody reads the ring any more
            sums::arrive_relaxed();
            sums::wait_for_cluster();
        }
    };

    if (warp >= Shape::kConsumers / 32) {
        give_registers<Shape::kProducerRegisters>();
        if (threadIdx.x == Shape::kConsumers) {
            const auto copy_tokens = [&](int i, int slot) {
                unsigned char* to = ring + slot * slot_bytes;
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    copy_box(to + half * kTokens * 128, x_map, (first + i) * kStageDepth + 64 * half, token0, full + slot,
                             kEvictLast);
                }
            };
            if (a.pdl) {
                ptx::wait_for_previous_kernel();
                // not before: blocks of the kernel after the next would take the places of the next one's
                ptx::let_next_kernel_start();
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
        if (plan.split > 1) wait_to_send();
    } else {
        take_registers<Shape::kConsumerRegisters>();
        float sums[kTokens / 2];
        sum_stages<T, kWeight, kTokens, kGroups, kShift>(sums, a, ring, full, empty, count);
        if (plan.split == 1) {
            if (a.pdl) ptx::wait_for_previous_kernel();  // the residual may be its result
#pragma unroll
            for (int j = 0; j < Shape::kEights; ++j) {
                if (token0 + 8 * j >= a.m) break;
                const ItemEnd<T, kWeight> end(a, row0 + warp * 16, token0 + 8 * j, lane);
                end.write(sums[4 * j], sums[4 * j + 1], sums[4 * j + 2], sums[4 * j + 3]);
            }
            return;
        }
        wait_to_send();
#pragma unroll
        for (int j = 0; j < Shape::kEights; ++j) {
            shares.send(warp * Shape::kEights + j, lane, received, ptx::shared_address(arrived), __float_as_uint(sums[4 * j]),
                        __float_as_uint(sums[4 * j + 1]), __float_as_uint(sums[4 * j + 2]), __float_as_uint(sums[4 * j + 3]));
        }
        if (a.pdl) ptx::wait_for_previous_kernel();
        for (int local = warp; local < shares.count(); local += 4 * kGroups) {
            const int item = shares.first() + local;
            const ItemEnd<T, kWeight> end(a, row0 + item / Shape::kEights * 16, token0 + item % Shape::kEights * 8, lane);
            wait(arrived, 0);
            float total[4] = {};
            for (int p = 0; p < plan.split; ++p) {
                const uint4 v = shares.part(received, local, p, lane);
                total[0] += __uint_as_float(v.x), total[1] += __uint_as_float(v.y);
                total[2] += __uint_as_float(v.z), total[3] += __uint_as_float(v.w);
            }
            end.write(total[0], total[1], total[2], total[3]);
        }
        wait(arrived, 0);  // no block may go while others send to it
    }
#endif
}

// The launch of one instance.
template <typename T, Weight kWeight, int kTokens, int kGroups, int kShift>
cudaError_t launch_split(const HopperLaunch& l) {
    using Shape = SplitShape<kWeight, kTokens, kGroups, kShift>;
    static unsigned long long done_devices = 0;
    const auto kernel = split_kernel<T, kWeight, kTokens, kGroups, kShift>;
    cudaError_t code = allow_shared(reinterpret_cast<const void*>(kernel), Shape::kMaxShared, done_devices);
    if (code != cudaSuccess) return code;
    cudaLaunchAttribute attributes[2];
    attributes[0].id = cudaLaunchAttributeClusterDimension;
    attributes[0].val.clusterDim.x = unsigned(l.plan.split);
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
    return cudaLaunchKernelEx(&config, kernel, *l.x_map, *l.weight_map, *l.arguments, l.plan);
}

template <typename T, Weight kWeight, int kTokens, int kGroups>
cudaError_t launch_split_tile(const HopperLaunch& l) {
    if constexpr (kWeight == Weight::kInt4) {
        if (l.arguments->group_shift == 0) return launch_split<T, kWeight, kTokens, kGroups, 0>(l);
        if (l.arguments->group_shift == 1) return launch_split<T, kWeight, kTokens, kGroups, 1>(l);
    }
    return launch_split<T, kWeight, kTokens, kGroups, 2>(l);
}

template <typename T, Weight kWeight>
cudaError_t launch_split_of(const HopperLaunch& l) {
    switch (l.tokens * 8 + l.groups) {
        case 16 * 8 + 2: return launch_split_tile<T, kWeight, 16, 2>(l);
        case 32 * 8 + 2: return launch_split_tile<T, kWeight, 32, 2>(l);
        case 64 * 8 + 2: return launch_split_tile<T, kWeight, 64, 2>(l);
        case 16 * 8 + 4: return launch_split_tile<T, kWeight, 16, 4>(l);
        case 32 * 8 + 4: return launch_split_tile<T, kWeight, 32, 4>(l);
        case 64 * 8 + 4: return launch_split_tile<T, kWeight, 64, 4>(l);
        default: return launch_split_tile<T, kWeight, 128, 4>(l);
    }
}

}  // namespace trtllm::weight_only
