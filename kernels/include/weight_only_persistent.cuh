// Weight-only products of many tokens on Hopper: tiles of 128 rows of weights x 256 tokens, or 128 x 128 and 192 x 128
// where the large ones would leave multiprocessors idle; one block a multiprocessor that works through its share of
// them, in clusters of two which have the tokens of a tile in common.
//
// Each consumer warpgroup turns 64 rows of weights into the first operand of wgmma in registers, four steps of 16
// inputs ahead of the products in flight; with so many tokens a product, conversion takes a small part of the time the
// matrix unit does. Tokens come as swizzled boxes of 64 inputs, half of them copied by either block of the cluster for
// both.
#pragma once

#include "weight_only_tensor_launch.hpp"
#include "weight_only_tile.cuh"
#include "weight_only_wgmma.cuh"

namespace trtllm::weight_only {

template <Weight kWeight, int Groups, int Tokens>
struct PersistentShape {
    static constexpr int kGroups = Groups;  // consumer warpgroups, of 64 rows each
    static constexpr int kRows = 64 * kGroups;
    static constexpr int kStripes = kRows / 16;
    static constexpr int kWarps = 4 * kGroups;  // that consume
    static constexpr int kTokens = Tokens;
    static constexpr int kShare = 2;
    static constexpr int kThreads = 128 * (kGroups + 1);
    static constexpr int kProducerRegisters = 40;
    static constexpr int kConsumerRegisters = kGroups == 2 ? 232 : 152;
    static constexpr int kTokenGroup = 4;  // tiles of tokens that the whole grid works on at a time: they stay in L2
    static constexpr int kTokenSlots = kTokens == 128 ? (kGroups == 2 ? 8 : 6) : kWeight == Weight::kInt4 ? 5 : 4;
    static constexpr int kWeightSlots = kTokens == 128 && kGroups == 2 ? 4 : 3;
    static constexpr int kTokenBytes = kTokens * 128;
    // int4 in groups of 32 with zeros; 8 bits
    static constexpr int kWeightSlotBytes = kStripes * (kWeight == Weight::kInt4 ? 1280 : 2048);
    static constexpr int kPassTokens = 128;  // written at a time by a warpgroup
    static constexpr int kStagingBytes = kPassTokens * 128;
    static constexpr int kShared =
        2048 + kTokenSlots * kTokenBytes + kWeightSlots * kWeightSlotBytes + kGroups * kStagingBytes;
    static_assert(kShared <= 227 * 1024, "more shared memory than a block may have");
};

/// Which tokens and rows tile `index` of the grid's is; the same for both blocks of a cluster.
struct TileAt {
    int token, row;
    template <typename Shape>
    static __device__ __forceinline__ TileAt of(int index, int token_tiles, int row_pairs) {
        const int before = index / (Shape::kTokenGroup * row_pairs) * Shape::kTokenGroup;
        const int rest = index - before * row_pairs, height = min(Shape::kTokenGroup, token_tiles - before);
        return {(before + rest % height) * Shape::kTokens, rest / height * Shape::kShare * Shape::kRows};
    }
};

// The sums of a warpgroup (64 rows x 256 tokens) to memory, through `staging`: rows are neighbours in the output, and a
// thread holds tokens that are neighbours.
template <typename T, typename Shape>
__device__ __forceinline__ void write_sums(const TensorArguments& a, float (&sums)[Shape::kTokens / 2],
                                           const float (&factor)[2], const float (&bias)[2], int token0, int row0,
                                           unsigned char* staging, int group) {
    const int thread = threadIdx.x % 128, warp = thread / 32, lane = thread % 32;
    const int shift = a.gate ? 2 : 3;  // log2 of the 16-byte pieces of a token's outputs here
    const int column0 = a.gate ? row0 / 2 : row0;
    const T* residual = static_cast<const T*>(a.residual);
#pragma unroll
    for (int i = 0; i < Shape::kTokens / 4; ++i) {
        const int row = i % 2;
        sums[2 * i] = sums[2 * i] * factor[row] + bias[row];
        sums[2 * i + 1] = sums[2 * i + 1] * factor[row] + bias[row];
    }
    if (a.gate) {
#pragma unroll
        for (int j = 0; j < Shape::kTokens / 8; ++j) {
            sums[4 * j] = gated(a.gate, sums[4 * j], sums[4 * j + 2]);
            sums[4 * j + 1] = gated(a.gate, sums[4 * j + 1], sums[4 * j + 3]);
        }
    }
#pragma unroll
    for (int pass = 0; pass < Shape::kTokens / Shape::kPassTokens; ++pass) {
        const int first = token0 + pass * Shape::kPassTokens;
        if (first >= a.m) break;
        // the pass before has been read
        ptx::named_barrier_sync<128>(1 + group);
        const auto each_piece = [&](auto visit) {
            for (int i = thread; i < Shape::kPassTokens << shift; i += 128) {
                const int token = i >> shift, piece = i & ((1 << shift) - 1), n = column0 + 8 * piece;
                unsigned char* at = staging + token * 128 + ((piece ^ (token & 7)) * 16);
                if (first + token < a.m && n < a.outputs) visit(int64_t(first + token), n, at);
            }
        };
        if (residual != nullptr) {
            each_piece([&](int64_t m, int n, unsigned char* at) {
                const T* from = residual + m * a.residual_stride + n;
                if (a.vector && n + 8 <= a.outputs) {
                    *reinterpret_cast<uint4*>(at) = *reinterpret_cast<const uint4*>(from);
                } else {
                    for (int e = 0; e < 8 && n + e < a.outputs; ++e) reinterpret_cast<T*>(at)[e] = from[e];
                }
            });
            ptx::named_barrier_sync<128>(1 + group);
        }
        // address of this lane's row of four 8 x 8 matrices: of tokens 8 * (j + ahead), of outputs 8 * piece
        const auto row_of = [&](int j, int ahead, int piece) {
            const int token = 8 * (j - pass * (Shape::kPassTokens / 8) + ahead) + lane % 8;
            return staging + token * 128 + ((piece ^ (token & 7)) * 16);
        };
        const auto write = [&](unsigned char* row, float (&v)[8]) {
            if (residual != nullptr) {
                uint32_t r[4];
                ptx::ldmatrix_x4_trans(r, row);
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const float2 f = unpack_pair<T>(r[i]);
                    v[2 * i] += f.x;
                    v[2 * i + 1] += f.y;
                }
            }
            const uint32_t packed[4] = {pack_pair<T>(v[0], v[1]), pack_pair<T>(v[2], v[3]), pack_pair<T>(v[4], v[5]),
                                        pack_pair<T>(v[6], v[7])};
            store_matrices_transposed(row, packed);
        };
        constexpr int kEights = Shape::kPassTokens / 8;
        if (a.gate) {
#pragma unroll
            for (int k = 0; k < kEights; k += 4) {
                const int j = pass * kEights + k;
                float v[8] = {sums[4 * j],     sums[4 * j + 1], sums[4 * j + 4],  sums[4 * j + 5],
                              sums[4 * j + 8], sums[4 * j + 9], sums[4 * j + 12], sums[4 * j + 13]};
                write(row_of(j, lane / 8, warp), v);
            }
        } else {
#pragma unroll
            for (int k = 0; k < kEights; k += 2) {
                const int j = pass * kEights + k;
                float v[8] = {sums[4 * j],     sums[4 * j + 1], sums[4 * j + 2], sums[4 * j + 3],
                              sums[4 * j + 4], sums[4 * j + 5], sums[4 * j + 6], sums[4 * j + 7]};
                write(row_of(j, lane / 16, 2 * warp + lane / 8 % 2), v);
            }
        }
        ptx::named_barrier_sync<128>(1 + group);
        each_piece([&](int64_t m, int n, unsigned char* at) {
            T* to = static_cast<T*>(a.out) + m * a.out_stride + n;
            if (a.vector && n + 8 <= a.outputs) {
                *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(at);
            } else {
                for (int e = 0; e < 8 && n + e < a.outputs; ++e) to[e] = reinterpret_cast<const T*>(at)[e];
            }
        });
    }
}

template <typename T, Weight kWeight, int kGroups, int kTileTokens>
__global__ void __launch_bounds__(PersistentShape<kWeight, kGroups, kTileTokens>::kThreads, 1)
    persistent_kernel(const __grid_constant__ CUtensorMap x_map, const __grid_constant__ CUtensorMap weight_map,
                      const __grid_constant__ TensorArguments a, int token_tiles, int row_pairs) {
#ifdef TRTLLM_SM90A
    using Shape = PersistentShape<kWeight, kGroups, kTileTokens>;
    extern __shared__ unsigned char raw[];
    unsigned char* base = raw + ((1024 - (ptx::shared_address(raw) & 1023)) & 1023);
    uint64_t* tokens_full = reinterpret_cast<uint64_t*>(base);
    uint64_t* tokens_empty = tokens_full + Shape::kTokenSlots;
    uint64_t* weights_full = tokens_empty + Shape::kTokenSlots;
    uint64_t* weights_empty = weights_full + Shape::kWeightSlots;
    unsigned char* token_ring = base + 1024;
    unsigned char* weight_ring = token_ring + Shape::kTokenSlots * Shape::kTokenBytes;
    unsigned char* staging = weight_ring + Shape::kWeightSlots * Shape::kWeightSlotBytes;

    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, group = warp / 4;
    const int rank = int(cluster_rank());
    const int tiles = token_tiles * row_pairs, step = int(gridDim.x) / Shape::kShare;

    if (threadIdx.x == 0) {
        for (int i = 0; i < Shape::kTokenSlots; ++i) {
            ptx::barrier_init(tokens_full + i, 1);
            ptx::barrier_init(tokens_empty + i, Shape::kWarps * Shape::kShare);
        }
        for (int i = 0; i < Shape::kWeightSlots; ++i) {
            ptx::barrier_init(weights_full + i, 1);
            ptx::barrier_init(weights_empty + i, Shape::kWarps);
        }
        ptx::barrier_init_fence();
    }
    cluster_sync();

    if (group == kGroups) {
        give_registers<Shape::kProducerRegisters>();
        if (threadIdx.x == 128 * kGroups) {
            prefetch_map(x_map);
            prefetch_map(weight_map);
            int slot = 0, parity = 1, weight_slot = 0, weight_parity = 1;
            bool first = true;
            for (int index = int(blockIdx.x) / Shape::kShare; index < tiles; index += step) {
                const TileAt tile = TileAt::of<Shape>(index, token_tiles, row_pairs);
                const int stripe = (tile.row + rank * Shape::kRows) / 16, token = tile.token + rank * (Shape::kTokens / 2);
                for (int i = 0; i < a.stages; ++i) {
                    wait(weights_empty + weight_slot, weight_parity);
                    ptx::barrier_expect(weights_full + weight_slot, uint32_t(Shape::kStripes * a.stripe_bytes));
                    copy_box(weight_ring + weight_slot * Shape::kWeightSlotBytes, weight_map, i * (a.stripe_bytes / 8), stripe,
                             weights_full + weight_slot, kEvictFirst);
                    if (++weight_slot == Shape::kWeightSlots) weight_slot = 0, weight_parity ^= 1;
                    if (first && a.pdl) ptx::wait_for_previous_kernel();
                    first = false;
#pragma unroll
                    for (int half = 0; half < 2; ++half) {
                        wait(tokens_empty + slot, parity);
                        ptx::barrier_expect(tokens_full + slot, Shape::kTokenBytes);
                        copy_box_multicast(token_ring + slot * Shape::kTokenBytes + rank * (Shape::kTokenBytes / 2), x_map,
                                           i * kStageDepth + 64 * half, token, tokens_full + slot, 3, kEvictLast);
                        if (++slot == Shape::kTokenSlots) slot = 0, parity ^= 1;
                    }
                }
            }
            if (a.pdl) ptx::let_next_kernel_start();
        }
        __syncwarp();
        cluster_sync();
    } else {
        take_registers<Shape::kConsumerRegisters>();
        if (a.pdl) ptx::wait_for_previous_kernel();
        float sums[Shape::kTokens / 2];
        uint32_t fragments[2][4][4];
        StripeTile<T, kWeight> stripe;
        int slot = 0, parity = 0, before = 0, weight_slot = 0, weight_parity = 0;
        for (int index = int(blockIdx.x) / Shape::kShare; index < tiles; index += step) {
            const TileAt tile = TileAt::of<Shape>(index, token_tiles, row_pairs);
            const int row0 = tile.row + rank * Shape::kRows + 64 * group;
            for (int i = 0; i < a.stages; ++i) {
                wait(weights_full + weight_slot, weight_parity);
                stripe.load(weight_ring + weight_slot * Shape::kWeightSlotBytes + warp * a.stripe_bytes, lane);
                const auto half = [&](auto which) {
                    constexpr int kHalf = decltype(which)::value;
                    auto& f = fragments[kHalf];
                    const auto convert = [&](auto s) {
                        constexpr int kStep = kHalf * 4 + decltype(s)::value;
                        if constexpr (kStep % 2 == 0) stripe.select(kStep / 2, a, lane);
                        stripe.template fragment<kStep>(f[decltype(s)::value]);
                    };
                    unroll<4>(convert);
                    pin(f);
                    if constexpr (kHalf == 1) {
                        __syncwarp();
                        if (lane == 0) ptx::barrier_arrive(weights_empty + weight_slot);
                    }
                    wait(tokens_full + slot, parity);
                    const uint64_t tokens = descriptor(token_ring + slot * Shape::kTokenBytes);
                    wgmma_fence();
#pragma unroll
                    for (int s = 0; s < 4; ++s) Wgmma<T, Shape::kTokens>::run(sums, f[s], tokens + 2 * s, i + kHalf + s > 0);
                    wgmma_commit();
                    wgmma_wait<1>();
                    // what was multiplied before these four may be overwritten, in the blocks that copy into this one
                    if (i + kHalf > 0 && lane < Shape::kShare) arrive_in(tokens_empty + before, lane);
                    before = slot;
                    if (++slot == Shape::kTokenSlots) slot = 0, parity ^= 1;
                };
                unroll<2>(half);
                if (++weight_slot == Shape::kWeightSlots) weight_slot = 0, weight_parity ^= 1;
            }
            wgmma_wait<0>();
            pin(sums);
            if (lane < Shape::kShare) arrive_in(tokens_empty + before, lane);
            const int row = row0 + warp % 4 * 16 + lane / 4;
            const float factor[2] = {row_factor<T, kWeight>(a, row), row_factor<T, kWeight>(a, row + 8)};
            const float bias[2] = {row_bias<T>(a, row), row_bias<T>(a, row + 8)};
            write_sums<T, Shape>(a, sums, factor, bias, tile.token, row0, staging + group * Shape::kStagingBytes, group);
        }
        // no block may go while the other one arrives at its barriers or copies into it
        cluster_sync();
    }
#endif
}

template <typename T, Weight kWeight, int kGroups, int kTileTokens>
cudaError_t launch_persistent_tile(const HopperLaunch& l) {
    using Shape = PersistentShape<kWeight, kGroups, kTileTokens>;
    static unsigned long long done_devices = 0;
    const auto kernel = persistent_kernel<T, kWeight, kGroups, kTileTokens>;
    const cudaError_t code = allow_shared(reinterpret_cast<const void*>(kernel), Shape::kShared, done_devices);
    if (code != cudaSuccess) return code;
    cudaLaunchAttribute attributes[2];
    attributes[0].id = cudaLaunchAttributeClusterDimension;
    attributes[0].val.clusterDim.x = Shape::kShare;
    attributes[0].val.clusterDim.y = attributes[0].val.clusterDim.z = 1;
    attributes[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[1].val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(unsigned(l.blocks));
    config.blockDim = dim3(Shape::kThreads);
    config.dynamicSmemBytes = Shape::kShared;
    config.stream = l.stream;
    config.attrs = attributes;
    config.numAttrs = l.arguments->pdl ? 2 : 1;
    return cudaLaunchKernelEx(&config, kernel, *l.x_map, *l.weight_map, *l.arguments, int(l.plan.token_tiles),
                              int(l.row_tiles / Shape::kShare));
}

template <typename T, Weight kWeight>
cudaError_t launch_persistent(const HopperLaunch& l) {
    if (l.tokens == 256) return launch_persistent_tile<T, kWeight, 2, 256>(l);
    if (l.groups == 3) return launch_persistent_tile<T, kWeight, 3, 128>(l);
    return launch_persistent_tile<T, kWeight, 2, 128>(l);
}

}  // namespace trtllm::weight_only
