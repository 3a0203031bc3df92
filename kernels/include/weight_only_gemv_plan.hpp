// How a launch of the kernels for few tokens is cut: computed on the host, the same for every block.
#pragma once

#include "weight_only.hpp"

namespace trtllm::weight_only {

constexpr int kGemvWarps = 16;  // a block, at most
constexpr int kDenseWarps = 8;
constexpr int kMostStages = 8;  // of a warp's ring
constexpr int kPartialAt = kGemvWarps * kMostStages * 8;    // after the rings' barriers: the norm's sums [8][warps]
constexpr int kArrivedAt = kPartialAt + 8 * kGemvWarps * 4;  // the barrier of a cluster's sums
constexpr int kXAt = kArrivedAt + 16;

struct GemvPlan {
    int warps;                // a block; 2^slices_log * groups
    int slices_log;           // 2^ so many warps share a stripe
    int groups;               // stripes a block works on at a time
    int cluster_log;          // 2^ so many blocks share a stripe's inputs
    int grid;                 // clusters launched
    int rounds, rounds_rest;  // `groups` stripes each, of every block; one more for the first `rounds_rest`
    int tiles;                // along K
    int stripes;              // of N, padding left out
    int tile_bytes;
    int chunk_tiles, stages;  // of a warp's ring
    int row_log;              // 2^ so many threads bring a token's inputs; at least a warp
    int batch;                // rounds whose sums wait for one barrier
    int x_bytes;              // between tokens in shared memory
    int records_at, reduce_at, result_at, ring_at;  // offsets in shared memory
    int shared_bytes;
    unsigned token_inverse;  // 2^16 / tokens, rounded up: h * it >> 16 is h / tokens for h < 2^13
    float inverse_k;
};

}  // namespace trtllm::weight_only
