// The choice among the Hopper kernels: a model of their time whose constants were measured.
#include <cuda_runtime.h>

#include <algorithm>

#include "registry.hpp"
#include "weight_only_choice.hpp"

namespace trtllm::weight_only {
namespace {

constexpr int kStage = 128;  // inputs in a stage of the kernels' pipelines

int ceil_div(int64_t a, int64_t b) { return int((a + b - 1) / b); }

// Microseconds that split_kernel takes: of a wave of blocks without its products, and of one stage of a block. Fitted
// (least squares of the logarithms, slow ways weighing less) to every way of doing 8B Llama's four products with 1 to
// 512 tokens, int8 and int4 in groups of 128, on an H200. From 8 tokens on, the way this model chooses took 1.01 times
// the fastest's time on average and 1.08 times at most.
struct SplitTimes {
    int tokens;
    double wave;
    struct {
        double two_alone;   // blocks of two warpgroups, one a multiprocessor
        double two_paired;  // two a multiprocessor
        double four;        // blocks of four warpgroups
    } int4, eight;
};
constexpr SplitTimes kSplitTimes[] = {
    {16, 3.60, {0.380, 0.726, 0.760}, {0.404, 0.708, 0.624}},
    {32, 4.63, {0.443, 0.763, 0.812}, {0.436, 0.749, 0.684}},
    {64, 6.17, {0.548, 0.890, 0.955}, {0.547, 0.901, 0.892}},
    {128, 9.51, {0.0, 0.0, 1.310}, {0.0, 0.0, 1.301}},
};
constexpr double kBytesPerMicrosecond = 3.84e6;  // of weights, while a wave of split_kernel runs
constexpr double kLargeCluster = 0.5;            // microseconds more a warpgroup in clusters of more than four blocks

// The persistent kernel's, of the same measurements: of a stage of a tile, and of a tile besides.
struct PersistentTimes {
    int tokens, groups;
    double stage, tile;
};
constexpr PersistentTimes kPersistentTimes[] = {{256, 2, 1.17, 5.0}, {128, 2, 0.744, 3.9}, {128, 3, 0.976, 4.4}};

// Any kernel, to ask how many clusters of a shape fit on the GPU: that depends on how its multiprocessors are grouped,
// which differs from one chip to the next.
__global__ void shaped_kernel() {}

// Blocks of split_kernel that run at a time, `per` on a multiprocessor, in clusters of `cluster`.
int resident_blocks(int per, int cluster) {
    static short known[64][3][9];
    int device = 0;
    if (cudaGetDevice(&device) != cudaSuccess || device >= 64) return multiprocessors() * per;
    short& found = known[device][per][cluster];
    if (found == 0) {
        const int bytes = per == 1 ? 200 * 1024 : 100 * 1024;
        cudaLaunchAttribute attribute;
        attribute.id = cudaLaunchAttributeClusterDimension;
        attribute.val.clusterDim = {unsigned(cluster), 1, 1};
        cudaLaunchConfig_t config = {};
        config.gridDim = dim3(unsigned(cluster));
        config.blockDim = dim3(384);
        config.dynamicSmemBytes = size_t(bytes);
        config.attrs = &attribute;
        config.numAttrs = 1;
        int clusters = 0;
        const void* kernel = reinterpret_cast<const void*>(shaped_kernel);
        if (cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes) != cudaSuccess ||
            cudaOccupancyMaxActiveClusters(&clusters, kernel, &config) != cudaSuccess || clusters < 1) {
            cudaGetLastError();  // not this product's failure: count as if clusters always fitted
            clusters = std::max(1, multiprocessors() * per / cluster);
        }
        found = short(clusters * cluster);
    }
    return found;
}

double split_time(const trtllm_weight_only_gemm_params& p, const SplitTimes& times, int groups, int split) {
    const bool int4 = p.weight_dtype == TRTLLM_INT4;
    const auto& of_stage = int4 ? times.int4 : times.eight;
    const int per = 4 / groups, stages = ceil_div(ceil_div(p.k, kStage), split);
    const int at_once = resident_blocks(per, split), alone = resident_blocks(1, split);
    const double block_bytes = 4.0 * groups * tile_bytes(p.weight_dtype, p.group, p.has_zero != 0) * (int4 ? 1 : 2);
    double time = split > 4 ? kLargeCluster * groups : 0.0;
    for (int64_t left = int64_t(ceil_div(p.n, 64 * groups)) * ceil_div(p.m, times.tokens) * split; left > 0;) {
        const int blocks = int(std::min<int64_t>(left, at_once));
        // blocks that begin while the kernel before still runs crowd on what it left free, unless few are wanted
        const bool paired = 3 * blocks > 2 * alone;
        const double products = groups == 4 ? of_stage.four : paired ? of_stage.two_paired : of_stage.two_alone;
        time += stages * std::max(products, block_bytes * blocks / kBytesPerMicrosecond) + times.wave;
        left -= blocks;
    }
    return time;
}

}  // namespace

bool read_tactic(int tactic, Choice* c) {
    if (tactic == 101) {
        *c = {Kernel::kPortable, 0, 0, 0};
        return true;
    }
    if (tactic >= 102 && tactic <= 104) {
        *c = {Kernel::kPersistent, tactic == 102 ? 256 : 128, tactic == 104 ? 3 : 2, 1};
        return true;
    }
    const int log = tactic / 1000;
    *c = {Kernel::kSplit, log < 16 ? 1 << log : 0, tactic / 100 % 10, tactic % 10};
    if (c->tokens < 16 || c->tokens > 128 || (c->groups != 2 && c->groups != 4)) return false;
    if (c->tokens == 128 && c->groups == 2) return false;
    return tactic / 10 % 10 == 1 && c->split >= 1 && c->split <= 8;
}

Choice by_size(const trtllm_weight_only_gemm_params& p) {
    Choice best = {Kernel::kPersistent, 256, 2, 1};
    double least = 1e300;
    const auto consider = [&](const Choice& c, double time) {
        if (time < least) least = time, best = c;
    };
    const int stages = ceil_div(p.k, kStage);
    for (const SplitTimes& times : kSplitTimes) {
        // smaller tiles would read the weights again for every one of them
        if (times.tokens < 128 && times.tokens < p.m) continue;
        for (int groups : {2, 4}) {
            if (groups == 2 && times.tokens == 128) continue;
            // clusters of three blocks of two warpgroups were measured to crowd on a part of the multiprocessors
            for (int split : {1, 2, 3, 4, 6, 8}) {
                if (split > stages || (split == 3 && groups == 2)) continue;
                consider({Kernel::kSplit, times.tokens, groups, split}, split_time(p, times, groups, split));
            }
        }
    }
    for (const PersistentTimes& times : kPersistentTimes) {
        const int64_t tiles = int64_t(ceil_div(p.m, times.tokens)) * ceil_div(p.n, 128 * times.groups);
        const int rounds = ceil_div(tiles, std::max(1, multiprocessors() / 2));
        consider({Kernel::kPersistent, times.tokens, times.groups, 1}, rounds * (stages * times.stage + times.tile));
    }
    return best;
}

}  // namespace trtllm::weight_only
