// Host side of the decoder layers' kernel: how it is cut, and the kernels by type, each compiled in a file of its own.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "trtllm_kernels/decode_layer.h"

namespace trtllm::decode_layer {

constexpr int kWarps = 16;
constexpr int kThreads = 32 * kWarps;
constexpr int kMostSlots = 8;
constexpr int kMostSplits = 32;   // blocks that share a kv head's keys
constexpr int kMostGroup = 8;     // query heads a kv head
constexpr int kMostStripes = 32;  // of a product, a block: one output a thread
constexpr int kProducts = 4;      // qkv, o, gate and up, down

// Of shared memory: what it starts with; a stripe's sums, 16 of each warp; attention's queries and weights, its sums.
constexpr int kScratchBytes = 2560;
constexpr int kReducePitch = 272;  // floats
constexpr int query_bytes(int head_size) { return kMostGroup * (2 * head_size + 64) + 4 * head_size + kWarps * 512; }
constexpr int attention_bytes(int head_size) { return kWarps * 4 * (head_size + 4) * 4; }

constexpr int kTileBytes = 2048;  // of keys or values, in one buffer of a ring
constexpr int tile_keys(int head_size) { return kTileBytes / 2 / head_size; }

// The same for every block; computed on the host.
struct Plan {
    int grid;
    int threads;            // a block
    int slots, slot_bytes;  // of each warp's ring, where weights are packed of the block's
    int tile_bytes;
    int tiles[kProducts], stripes[kProducts], inputs[kProducts];
    int stripe_step[kProducts];  // bytes from a block's stripe to its next
    int splits;       // most blocks a kv head
    int block_tiles;  // least tiles of keys a block
    int page_shift;   // log2 of the page size
    // offsets in shared memory; each product has its sums apart: the next one may begin while they are read
    int x_at, sums_at, reduce_at[kProducts], query_at, ring_at;
    int shared_bytes;
    // offsets in the workspace
    int64_t stream_at[2], qkv_at, attended_at, gated_at, parts_at;
    int64_t workspace_bytes;
};

const void* int4_kernel(int32_t dtype, int32_t group, int32_t head_size);
const void* eight_kernel(int32_t dtype, int32_t weight_dtype, int32_t head_size);
const void* dense_kernel(int32_t dtype, int32_t head_size);

}  // namespace trtllm::decode_layer
