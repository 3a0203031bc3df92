// What a warp reads of the weights, in order, through a ring of buffers in shared memory.
#pragma once

#include "ptx.cuh"
#include "weight_only_gemv_plan.hpp"
#include "weight_only_gemv_tiles.cuh"

namespace trtllm::weight_only {

// A warp's weights through its ring of chunks in shared memory: tiles [first, end) of a stripe, then those of the
// stripe `groups` further. The ring belongs to the warp alone: no barrier between warps while weights stream in.
template <Kind K>
class Ring {
#if __CUDA_ARCH__ >= 900
    static constexpr bool kBulk = K != Kind::kDense;  // one contiguous run a chunk
#else
    static constexpr bool kBulk = false;
#endif
    const trtllm_weight_only_gemm_params& p;
    const GemvPlan& plan;
    uint64_t* const barriers;
    char* const buffers;
    const int lane, first, share;
    int stripe, stripes;         // the one asked for now, and how many there are from there on
    int left;                    // of its tiles
    const char* from = nullptr;  // of the next chunk; dense: the lane's
    int used = 0;                // the stage that is read next, and asked for after that
    uint32_t parity = 0;

    __device__ __forceinline__ void begin_stripe() {
        left = share;
        if constexpr (K != Kind::kDense) {
            from = static_cast<const char*>(p.weight) + (int64_t(stripe) * plan.tiles + first) * plan.tile_bytes;
        } else {
            const int64_t row = int64_t(stripe) * kStripeRows + lane / 16;
            from = static_cast<const char*>(p.weight) + (row * p.weight_stride + first * 128 + lane % 16 * 8) * 2;
        }
    }

  public:
    __device__ __forceinline__ Ring(const trtllm_weight_only_gemm_params& params, const GemvPlan& plan_of, char* shared,
                                    int lane_of, int warp, int first_tile, int end_tile, int first_stripe, int count)
        : p(params),
          plan(plan_of),
          barriers(reinterpret_cast<uint64_t*>(shared) + warp * kMostStages),
          buffers(shared + plan.ring_at + warp * plan.stages * plan.chunk_tiles * plan.tile_bytes),
          lane(lane_of),
          first(first_tile),
          share(end_tile - first_tile),
          stripe(first_stripe),
          stripes(end_tile > first_tile ? count : 0) {
        if constexpr (kBulk) {
            if (lane < plan.stages) ptx::barrier_init(&barriers[lane], 1);
            ptx::barrier_init_fence();
            ptx::fence_async_shared();
            __syncwarp();
        }
        begin_stripe();
#pragma unroll 1
        for (int s = 0; s < plan.stages; ++s) ask(s);
    }

    __device__ __forceinline__ void ask(int stage) {
        if (stripes > 0) {
            const int count = min(plan.chunk_tiles, left);
            char* const to = buffers + stage * (plan.chunk_tiles * plan.tile_bytes);
            const int bytes = count * plan.tile_bytes;
            if constexpr (kBulk) {
#if __CUDA_ARCH__ >= 900
                if (lane == 0) {
                    ptx::barrier_expect(&barriers[stage], bytes);
                    ptx::copy_bulk(to, from, bytes, &barriers[stage]);
                }
#endif
                from += bytes;
            } else if constexpr (K != Kind::kDense) {
#pragma unroll 3
                for (int at = lane * 16; at < bytes; at += 512) ptx::copy_async_16(to + at, from + at);
                from += bytes;
            } else {
                // 256 bytes of a row by half a warp
#pragma unroll 1
                for (int i = 0; i < count; ++i) {
                    const int64_t row = int64_t(stripe) * kStripeRows + lane / 16;
                    const bool inside = int64_t(first + share - left + i) * 128 + lane % 16 * 8 < p.k;
#pragma unroll
                    for (int r = 0; r < 16; r += 2) {
                        const bool any = inside && row + r < p.n;
                        char* const lane_to = to + i * kDenseTileBytes + (r + lane / 16) * 256 +
                                              (lane % 16 ^ ((r + lane / 16) % 8)) * 16;
                        ptx::copy_async_16(lane_to, any ? from + r * 2 * p.weight_stride : p.weight, any ? 16 : 0);
                    }
                    from += 256;
                }
            }
            left -= count;
            if (left == 0) {
                stripe += plan.groups, --stripes;
                begin_stripe();
            }
        }
        if constexpr (!kBulk) ptx::copy_async_commit();
    }

    // The address of the next chunk, once it is there.
    __device__ __forceinline__ const char* wait() {
        if constexpr (kBulk) {
            ptx::barrier_wait(&barriers[used], parity);
        } else {
            switch (plan.stages) {
                case 1: ptx::copy_async_wait<0>(); break;
                case 2: ptx::copy_async_wait<1>(); break;
                case 3: ptx::copy_async_wait<2>(); break;
                case 4: ptx::copy_async_wait<3>(); break;
                case 5: ptx::copy_async_wait<4>(); break;
                case 6: ptx::copy_async_wait<5>(); break;
                case 7: ptx::copy_async_wait<6>(); break;
                default: ptx::copy_async_wait<7>(); break;
            }
            __syncwarp();
        }
        return buffers + used * (plan.chunk_tiles * plan.tile_bytes);
    }

    // Every lane has read the chunk: another takes its place.
    __device__ __forceinline__ void release() {
        __syncwarp();
        ask(used);
        if (++used == plan.stages) used = 0, parity ^= 1;
    }
};

}  // namespace trtllm::weight_only
