// What a block reads from device memory where weights are packed, in order: each product's tiles and attention's keys and
// values, layer after layer, through one ring of large buffers that a warp of its own fills.
//
// None of it depends on what the layers compute, so that warp never waits for anything but a free buffer: while the
// others wait for the grid, what they need next arrives. One copy brings 32 tiles of a stripe, two for each of the 16
// warps that multiply: copies of some 30 KB reach the memory's bandwidth, those of 2 KB three quarters of it.
#pragma once

#include "decode_layer_ring.cuh"

namespace trtllm::decode_layer {

constexpr int kChunkTiles = 2 * kWarps;

// The tiles along K that are a warp's: of every kChunkTiles of a stripe an equal part, in one piece.
struct ChunkShare {
    int whole, rest, warp;  // chunks of kChunkTiles, tiles behind them
    __device__ __forceinline__ ChunkShare(int tiles, int warp_of)
        : whole(tiles / kChunkTiles), rest(tiles % kChunkTiles), warp(warp_of) {}
    __device__ __forceinline__ int chunks() const { return whole + (rest > 0); }
    // of chunk c: first tile, and one past the last
    __device__ __forceinline__ int first(int c) const {
        return c * kChunkTiles + (c < whole ? 2 * warp : warp * rest / kWarps);
    }
    __device__ __forceinline__ int end(int c) const {
        return c * kChunkTiles + (c < whole ? 2 * warp + 2 : (warp + 1) * rest / kWarps);
    }
    __device__ __forceinline__ int count() const {
        return 2 * whole + (warp + 1) * rest / kWarps - warp * rest / kWarps;
    }
    // the i-th of the warp's tiles
    __device__ __forceinline__ int tile(int i) const {
        return i < 2 * whole ? i / 2 * kChunkTiles + 2 * warp + i % 2 : first(whole) + i - 2 * whole;
    }
};

template <typename T, Kind K, int D>
class Stream {
    static constexpr int kTileKeys = tile_keys(D);

    const trtllm_decode_layer_params& p;
    const Plan& plan;
    const Keys& keys;  // in shared memory
    char* const buffers;
    uint64_t* const full;
    uint64_t* const empty;
    const int lane;
    int slot = 0;
    uint32_t parity = 0;

  public:
    static constexpr int kThreadsOfItsOwn = 32;  // beside those that compute

    __device__ __forceinline__ Stream(const trtllm_decode_layer_params& params, const Plan& plan_of,
                                      const Keys& keys_of, const trtllm_decode_layer_row*, char* shared,
                                      uint64_t* barriers)
        : p(params),
          plan(plan_of),
          keys(keys_of),
          buffers(shared + plan_of.ring_at),
          full(barriers),
          empty(barriers + kMostSlots),
          lane(threadIdx.x % 32) {
        if (threadIdx.x == 0) {
            for (int i = 0; i < kMostSlots; ++i) {
                ptx::barrier_init(&full[i], 1);
                ptx::barrier_init(&empty[i], kWarps);
            }
            ptx::barrier_init_fence();
            ptx::fence_async_shared();
        }
    }

    // The address of the next buffer, once what was asked for is in it. Each of the multiplying warps waits for every one.
    __device__ __forceinline__ uint32_t wait() const {
        ptx::barrier_wait(&full[slot], parity);
        return ptx::shared_address(buffers + slot * plan.slot_bytes);
    }
    // All lanes have read what they need of it.
    __device__ __forceinline__ void release() {
        __syncwarp();
        if (lane == 0) ptx::barrier_arrive(&empty[slot]);
        next();
    }
    // The next buffer has nothing for this warp.
    __device__ __forceinline__ void skip() {
        wait();
        release();
    }
    // what a ring's owner does itself is done by a warp here
    __device__ __forceinline__ void fill() {}
    __device__ __forceinline__ void may_read(int) {}
    // The warp's tile of keys in a buffer
    __device__ __forceinline__ uint32_t keys_of_warp(uint32_t buffer) const {
        return buffer + threadIdx.x / 32 * kTileBytes;
    }

    // By the warp that fills the buffers, all lanes.
    __device__ __forceinline__ void run() {
        parity = 1;  // the first round of buffers is free
#pragma unroll 1
        for (int layer = 0; layer < p.layers; ++layer) {
            const trtllm_decode_layer_row& row = p.table[layer];
            if (lane == 0 && layer + 1 < p.layers) {
                asm volatile("prefetch.global.L2 [%0];" ::"l"(&row + 1));
                asm volatile("prefetch.global.L2 [%0];" ::"l"(reinterpret_cast<const char*>(&row + 2) - 8));
            }
#pragma unroll 1
            for (int step = 0; step < kSteps; ++step) {
                if (step == kAttend) {
#pragma unroll 1
                    for (int from = keys.first; from < keys.end; from += kWarps) {
                        ask_keys(from, static_cast<const T*>(row.k_cache));
                        ask_keys(from, static_cast<const T*>(row.v_cache));
                    }
                } else {
                    ask_weights(static_cast<const char*>(row.weight[product_of(step)]), product_of(step));
                }
            }
        }
    }

  private:
    __device__ __forceinline__ void next() {
        if (++slot == plan.slots) slot = 0, parity ^= 1;
    }

    __device__ __forceinline__ void ask_weights(const char* weight, int product) {
        const int whole = plan.tiles[product] * plan.tile_bytes;  // of a stripe
        const char* from = weight + int64_t(blockIdx.x) * whole;
#pragma unroll 1
        for (int s = blockIdx.x; s < plan.stripes[product]; s += plan.grid, from += plan.stripe_step[product]) {
#pragma unroll 1
            for (int at = 0; at < whole; at += kChunkTiles * plan.tile_bytes) {
                ptx::barrier_wait(&empty[slot], parity);
                const int bytes = min(whole - at, kChunkTiles * plan.tile_bytes);
                if (lane == 0) {
                    ptx::barrier_expect(&full[slot], bytes);
                    ptx::copy_bulk(buffers + slot * plan.slot_bytes, from + at, bytes, &full[slot]);
                }
                __syncwarp();
                next();
            }
        }
    }

    // A tile for each warp. What lies behind the newest key is read with the others and not used. A lane asks for all
    // tiles of a page, from the first of them here.
    __device__ __forceinline__ void ask_keys(int from, const T* cache) {
        const int tiles = min(kWarps, keys.end - from), key = (from + lane) * kTileKeys, within = key & (p.page_size - 1);
        const int run = min((p.page_size - within) / kTileKeys, tiles - lane);
        const bool asks = lane < tiles && (lane == 0 || within == 0);
        const int64_t page = asks ? __ldg(p.page_table + (key >> plan.page_shift)) : 0;
        ptx::barrier_wait(&empty[slot], parity);
        if (lane == 0) ptx::barrier_expect(&full[slot], tiles * kTileBytes);
        __syncwarp();
        if (asks) {
            ptx::copy_bulk(buffers + slot * plan.slot_bytes + lane * kTileBytes,
                           cache + page * p.page_stride + keys.head * p.head_stride + within * D, run * kTileBytes,
                           &full[slot]);
        }
        __syncwarp();
        next();
    }
};

}  // namespace trtllm::decode_layer
