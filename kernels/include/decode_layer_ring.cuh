// What a warp reads from device memory, in order: its share of each product's weights and of attention's keys and
// values, layer after layer, through a ring of buffers in shared memory that belongs to the warp alone.
//
// None of it depends on what the layers compute, so the ring is always full: while a warp waits for the grid, what it
// needs next arrives. A block's rings hold about 170 KB.
#pragma once

#include "decode_layer.hpp"
#include "weight_only_gemv.cuh"

namespace trtllm::decode_layer {

using weight_only::Kind;

constexpr int kTileKeys = 16;
constexpr int kPieceBytes = 2048;  // of keys or values, in one buffer
template <Kind K>
constexpr int kSlotTiles = K == Kind::kDense ? 1 : 2;  // in one buffer

// The steps of a layer; products are numbered as in the row of the table.
enum Step { kQkv = 0, kAttend = 1, kO = 2, kUp = 3, kDown = 4, kSteps = 5 };
__device__ __forceinline__ int product_of(int step) { return step == kQkv ? 0 : step - 1; }

// Tiles [first, end) along K that are a warp's: the warps of a block share the inputs of each of its stripes.
struct Share {
    int first, end;
    __device__ __forceinline__ Share(int tiles, int warp)
        : first(warp * tiles / kWarps), end((warp + 1) * tiles / kWarps) {}
};

// A block's part of the keys: 16-key tiles [first, end) of a kv head, one of `splits` parts; none where it has no head.
struct Keys {
    int head, split, splits, first, end, length;
    __device__ __forceinline__ Keys(const trtllm_decode_layer_params& p, const Plan& plan) {
        length = min(max(p.lengths[0], 1), p.max_length);
        const int tiles = (length + kTileKeys - 1) / kTileKeys;
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
    static constexpr bool kBulk = K != Kind::kDense;
    static constexpr int kPieces = kTileKeys * D * 2 / kPieceBytes;  // of 16 keys

    const trtllm_decode_layer_params& p;
    const Plan& plan;
    const Keys& keys;  // in shared memory, like the rows
    const trtllm_decode_layer_row* const rows;  // in shared memory: of the layers with even and odd numbers
    char* const buffers;
    uint64_t* const barriers;
    const int lane, warp;

    int used = 0;          // the buffer that is read next
    uint32_t parity = 0;
    int held = 0;          // buffers asked for and not given back
    int asked = 0;         // the buffer that is asked for next
    int layer = 0, step = kQkv;
    bool fresh = true;     // the step has not begun
    // products: where the next tiles lie, what is left of the share of a stripe (bytes, dense: tiles), of the stripes
    const char* from = nullptr;
    int left = 0, share = 0, stripes = 0;
    int unit = 0, piece = 0;  // attention: 16 keys, and the piece of them and their values; dense: end of the share

  public:
    int limit = -1;  // the last layer whose row of the table is there

    __device__ __forceinline__ Ring(const trtllm_decode_layer_params& params, const Plan& plan_of,
                                    const Keys& keys_of, const trtllm_decode_layer_row* rows_of, char* shared,
                                    uint64_t* barriers_of)
        : p(params),
          plan(plan_of),
          keys(keys_of),
          rows(rows_of),
          buffers(shared + plan_of.ring_at + threadIdx.x / 32 * plan_of.slots * plan_of.slot_bytes),
          barriers(barriers_of + threadIdx.x / 32 * kMostSlots),
          lane(threadIdx.x % 32),
          warp(threadIdx.x / 32) {
        if (lane == 0) {
#pragma unroll 1
            for (int i = 0; i < plan.slots; ++i) ptx::barrier_init(&barriers[i], kBulk ? 1 : 32);
            ptx::barrier_init_fence();
            ptx::fence_async_shared();
        }
        __syncwarp();
    }

    // The address of the buffer `ahead` of the next one, once what was asked for is in it.
    __device__ __forceinline__ uint32_t wait(int ahead = 0) const {
        int slot = used + ahead;
        uint32_t phase = parity;
        if (slot >= plan.slots) slot -= plan.slots, phase ^= 1;
        ptx::barrier_wait(&barriers[slot], phase);
        return ptx::shared_address(buffers + slot * plan.slot_bytes);
    }

    // All lanes have read the next `count` buffers: `fill` may ask for others into them.
    __device__ __forceinline__ void release(int count) {
        __syncwarp();
        used += count;
        if (used >= plan.slots) used -= plan.slots, parity ^= 1;
        held -= count;
    }

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
        if constexpr (kBulk) {
            share = (mine.end - mine.first) * plan.tile_bytes;
            from = weight + (int64_t(blockIdx.x) * tiles + mine.first) * plan.tile_bytes;
        } else {
            share = mine.end - mine.first;
            unit = mine.end;
            piece = product;
            const int64_t bytes = int64_t(plan.inputs[product]) * 2;  // of a row
            from = weight + (int64_t(blockIdx.x) * 16 + lane / 8) * bytes + mine.first * 128 + lane % 8 * 16;
        }
        left = share;
        return stripes > 0 && share > 0;
    }

    __device__ __forceinline__ void next_step() {
        fresh = true;
        if (++step == kSteps) step = 0, ++layer;
    }

    __device__ __forceinline__ void ask() {
        char* const to = buffers + asked * plan.slot_bytes;
        uint64_t* const barrier = &barriers[asked];
        if (step == kAttend) {
            ask_keys(to, barrier, rows[layer & 1]);
        } else {
            if constexpr (kBulk) {
                const int bytes = min(plan.slot_bytes, left);
                if (lane == 0) {
                    ptx::barrier_expect(barrier, bytes);
                    ptx::copy_bulk(to, from, bytes, barrier);
                }
                left -= bytes;
                from += bytes;
            } else {
                ask_dense(to, barrier);
                --left;
                from += 128;
            }
            if (left == 0) {
                left = share;
                from += plan.stripe_step[product_of(step)] - (kBulk ? share : share * 128);
                if (--stripes == 0) next_step();
            }
        }
        if (++asked == plan.slots) asked = 0;
        ++held;
    }

    // 16 rows x 64 inputs, chunk c of row r at (8 r + (c ^ 4 (r % 2))) * 16: two rows' chunks lie in different banks.
    __device__ __forceinline__ void ask_dense(char* to, uint64_t* barrier) const {
        const int64_t bytes = int64_t(plan.inputs[piece]) * 2;
        const bool inside = (unit - left) * 64 + lane % 8 * 8 < plan.inputs[piece];
        char* const lane_to = to + (lane / 8 * 8 + (lane % 8 ^ 4 * (lane / 8 % 2))) * 16;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            ptx::copy_async_16(lane_to + i * 512, inside ? from + i * 4 * bytes : from, inside ? 16 : 0);
        }
        asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(ptx::shared_address(barrier))
                     : "memory");
    }

    // Pieces of 16 keys, then of their values. What lies behind the newest key is read with them and not used.
    __device__ __forceinline__ void ask_keys(char* to, uint64_t* barrier, const trtllm_decode_layer_row& row) {
        if (lane == 0) {
            const int key = unit * kTileKeys, page = __ldg(p.page_table + (key >> plan.page_shift));
            const bool value = piece >= kPieces;
            const int64_t at = page * p.page_stride + keys.head * p.head_stride + (key & (p.page_size - 1)) * D +
                               (value ? piece - kPieces : piece) * (kPieceBytes / 2);
            ptx::barrier_expect(barrier, kPieceBytes);
            ptx::copy_bulk(to, static_cast<const T*>(value ? row.v_cache : row.k_cache) + at, kPieceBytes, barrier);
        } else if constexpr (!kBulk) {
            ptx::barrier_arrive(barrier);
        }
        if (++piece == 2 * kPieces) {
            piece = 0;
            unit += kWarps;
            if (unit >= keys.end) next_step();
        }
    }
};

}  // namespace trtllm::decode_layer
