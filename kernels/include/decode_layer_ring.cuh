// What a warp reads from device memory where weights are not packed, in order: its share of each product's weights and of
// attention's keys and values, layer after layer, through a ring of buffers in shared memory that belongs to the warp
// alone.
//
// None of it depends on what the layers compute, so the ring is full whenever the warp has just asked: while it waits for
// the grid, what it needs next arrives. A block's rings hold about 170 KB.
#pragma once

#include "decode_layer.hpp"
#include "weight_only_gemv.cuh"

namespace trtllm::decode_layer {

using weight_only::Kind;

// The steps of a layer; products are numbered as in the row of the table.
enum Step { kQkv = 0, kAttend = 1, kO = 2, kUp = 3, kDown = 4, kSteps = 5 };
__device__ __forceinline__ int product_of(int step) { return step == kQkv ? 0 : step - 1; }

// Tiles [first, end) along K that are a warp's: the warps of a block share the inputs of each of its stripes.
struct Share {
    int first, end;
    __device__ __forceinline__ Share(int tiles, int warp)
        : first(warp * tiles / kWarps), end((warp + 1) * tiles / kWarps) {}
    __device__ __forceinline__ int count() const { return end - first; }
    __device__ __forceinline__ int tile(int i) const { return first + i; }
};

// A block's part of the keys: tiles [first, end) of a kv head, one of `splits` parts; none where it has no head.
struct Keys {
    int head, split, splits, first, end, length;
    __device__ __forceinline__ Keys(const trtllm_decode_layer_params& p, const Plan& plan, int tile_keys) {
        length = min(max(p.lengths[0], 1), p.max_length);
        const int tiles = (length + tile_keys - 1) / tile_keys;
        splits = min(plan.splits, max(1, tiles / plan.block_tiles));
        head = int(blockIdx.x) / splits;
        split = int(blockIdx.x) - head * splits;
        const bool any = head < p.kv_heads;
        first = any ? split * tiles / splits : 0;
        end = any ? (split + 1) * tiles / splits : 0;
    }
};

template <typename T, Kind K, int D>
class Ring {
    static_assert(K == Kind::kDense);
    static constexpr int kTileKeys = tile_keys(D);

    const trtllm_decode_layer_params& p;
    const Plan& plan;
    const Keys& keys;  // in shared memory, like the rows
    const trtllm_decode_layer_row* const rows;  // in shared memory: of the layers with even and odd numbers
    char* const shared;
    uint64_t* const barriers;  // of all warps
    const int lane, warp;

    int used = 0;          // the buffer that is read next
    uint32_t parity = 0;
    int held = 0;          // buffers asked for and not given back
    int asked = 0;         // the buffer that is asked for next
    int layer = 0, step = kQkv;
    bool fresh = true;     // the step has not begun
    // products: where the next tile lies, how many are left of the share of a stripe, of the stripes
    const char* from = nullptr;
    int left = 0, share = 0, stripes = 0;
    int unit = 0, piece = 0;  // attention: tile of keys, and 1 for its values; products: end of the share, product
    int limit = -1;           // the last layer whose row of the table is there

  public:
    static constexpr int kThreadsOfItsOwn = 0;  // beside those that compute

    __device__ __forceinline__ Ring(const trtllm_decode_layer_params& params, const Plan& plan_of,
                                    const Keys& keys_of, const trtllm_decode_layer_row* rows_of, char* memory,
                                    uint64_t* barriers_of)
        : p(params),
          plan(plan_of),
          keys(keys_of),
          rows(rows_of),
          shared(memory),
          barriers(barriers_of),
          lane(threadIdx.x % 32),
          warp(threadIdx.x / 32) {
        if (lane == 0) {
#pragma unroll 1
            for (int i = 0; i < plan.slots; ++i) ptx::barrier_init(barrier_of(i), 32);
            ptx::barrier_init_fence();
            ptx::fence_async_shared();
        }
        __syncwarp();
    }

    // The address of the next buffer, once what was asked for is in it.
    __device__ __forceinline__ uint32_t wait() const {
        ptx::barrier_wait(barrier_of(used), parity);
        return ptx::shared_address(buffer(used));
    }

    // All lanes have read the next buffer: `fill` may ask for something else into it.
    __device__ __forceinline__ void release() {
        __syncwarp();
        if (++used == plan.slots) used = 0, parity ^= 1;
        --held;
    }

    // What others do about a buffer that this warp needs nothing of: it has none of those.
    __device__ __forceinline__ void skip() {}
    __device__ __forceinline__ uint32_t keys_of_warp(uint32_t buffer) const { return buffer; }
    // Rows of the table up to that of `layer` are there.
    __device__ __forceinline__ void may_read(int layer) { limit = layer; }
    __device__ __forceinline__ void run() {}  // nothing to do for a warp of its own

    // Asks for what there is room for.
    __device__ __forceinline__ void fill() {
#pragma unroll 1
        while (held < plan.slots) {
            if (fresh) {
                if (layer >= p.layers || layer > limit) return;
                if (!begin()) {
                    next_step();
                    continue;
                }
                fresh = false;
            }
            ask();
        }
    }

  private:
    __device__ __forceinline__ char* buffer(int slot) const {
        return shared + plan.ring_at + (warp * plan.slots + slot) * plan.slot_bytes;
    }
    __device__ __forceinline__ uint64_t* barrier_of(int slot) const { return barriers + warp * kMostSlots + slot; }

    // False where the warp has no part in the step.
    __device__ __forceinline__ bool begin() {
        if (step == kAttend) {
            unit = keys.first + warp;
            piece = 0;
            return unit < keys.end;
        }
        const int product = product_of(step), tiles = plan.tiles[product];
        const Share mine(tiles, warp);
        stripes = (plan.stripes[product] - int(blockIdx.x) + plan.grid - 1) / plan.grid;
        const char* const weight = static_cast<const char*>(rows[layer & 1].weight[product]);
        share = mine.end - mine.first;
        unit = mine.end;
        piece = product;
        const int64_t bytes = int64_t(plan.inputs[product]) * 2;  // of a row
        from = weight + (int64_t(blockIdx.x) * 16 + lane / 8) * bytes + mine.first * 128 + lane % 8 * 16;
        left = share;
        return stripes > 0 && share > 0;
    }

    __device__ __forceinline__ void next_step() {
        fresh = true;
        if (++step == kSteps) step = 0, ++layer;
    }

    __device__ __forceinline__ void ask() {
        char* const to = buffer(asked);
        uint64_t* const barrier = barrier_of(asked);
        if (step == kAttend) {
            ask_keys(to, barrier, rows[layer & 1]);
        } else {
            ask_dense(to, barrier);
            --left;
            from += 128;
            if (left == 0) {
                left = share;
                from += plan.stripe_step[product_of(step)] - share * 128;
                if (--stripes == 0) next_step();
            }
        }
        if (++asked == plan.slots) asked = 0;
        ++held;
    }

    // 16 rows x 64 inputs, chunk c of row r at (8 r + (c ^ 4 (r % 2))) * 16: two rows' chunks lie in different banks.
    __device__ __forceinline__ void ask_dense(char* to, uint64_t* barrier) const {
        const int64_t step = int64_t(plan.inputs[piece]) * 8;  // bytes of four rows
        const bool inside = (unit - left) * 64 + lane % 8 * 8 < plan.inputs[piece];
        char* const lane_to = to + (lane / 8 * 8 + (lane % 8 ^ 4 * (lane / 8 % 2))) * 16;
        const char* lane_from = from;
#pragma unroll
        for (int i = 0; i < 4; ++i, lane_from += inside ? step : 0) {
            ptx::copy_async_16(lane_to + i * 512, lane_from, inside ? 16 : 0);
        }
        arrive_copied(barrier);
    }
    __device__ __forceinline__ static void arrive_copied(uint64_t* barrier) {
        asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(ptx::shared_address(barrier))
                     : "memory");
    }

    // A tile of keys, then of their values. What lies behind the newest key is read with them and not used.
    __device__ __forceinline__ void ask_keys(char* to, uint64_t* barrier, const trtllm_decode_layer_row& row) {
        if (lane == 0) {
            const int key = unit * kTileKeys, page = __ldg(p.page_table + (key >> plan.page_shift));
            const int64_t at = page * p.page_stride + keys.head * p.head_stride + (key & (p.page_size - 1)) * D;
            ptx::barrier_expect(barrier, kTileBytes);
            ptx::copy_bulk(to, static_cast<const T*>(piece ? row.v_cache : row.k_cache) + at, kTileBytes, barrier);
        } else {
            ptx::barrier_arrive(barrier);
        }
        if (++piece == 2) {
            piece = 0;
            unit += kWarps;
            if (unit >= keys.end) next_step();
        }
    }
};

}  // namespace trtllm::decode_layer
