// Host side of the products for few tokens: how a launch is cut over the GPU.
#include <algorithm>

#include "registry.hpp"
#include "weight_only_gemv.cuh"
#include "weight_only_gemv_launch.hpp"

namespace trtllm::weight_only {
namespace {

struct Tactic {
    int warps;        // a block, at most
    int stage_tiles;  // 1024-byte tiles in a stage of each warp's ring of kStages
    int blocks;       // a multiprocessor
    int token_kib;    // of shared memory for the tokens; more are split over a cluster
};
constexpr Tactic kTactics[] = {{16, 1, 1, 120}, {8, 2, 1, 120}, {16, 2, 1, 120}, {8, 4, 1, 120}, {8, 1, 2, 60},
                               {8, 2, 2, 60}, {4, 4, 2, 60}, {16, 3, 1, 120}, {16, 1, 1, 60}, {16, 2, 1, 60}};
constexpr int kTacticCount = sizeof kTactics / sizeof kTactics[0];

struct Device {
    int multiprocessors;
    int shared_bytes;  // a block may ask for
    bool clusters;
};

constexpr int round_up(int64_t value, int to) { return int((value + to - 1) / to * to); }
constexpr int divide_up(int value, int by) { return (value + by - 1) / by; }

// How many of a block's warps share a stripe. Many where stripes are few; else so few that a warp has four tiles of
// each stripe, as long as that leaves no more multiprocessors idle in the last round.
int slices_of(const Tactic& tactic, const GemvPlan& plan, int units) {
    int slices = 1;
    while (slices * 2 <= tactic.warps && slices * 2 * plan.cluster <= plan.tiles) slices *= 2;
    const int alone = divide_up(plan.stripes, units);
    while (slices > 1 && plan.tiles < 4 * slices * plan.cluster) {
        const int groups = tactic.warps / (slices / 2);
        if (divide_up(plan.stripes, groups * units) * groups * 20 > alone * 21) break;
        slices /= 2;
    }
    return slices;
}

// False where the tokens do not fit into shared memory.
bool cut(const trtllm_weight_only_gemm_params& p, const Tactic& tactic, const Device& device, int cluster,
         GemvPlan& plan) {
    plan = {};
    const bool dense = !packed(p);
    plan.depth = dense ? 32 : tile_depth(p.weight_dtype);
    plan.tile_bytes = dense ? kTileWeightBytes : tile_bytes(p.weight_dtype, p.group, p.has_zero != 0);
    plan.tiles = int((p.k + plan.depth - 1) / plan.depth);
    plan.stripes = int((p.n + kStripeRows - 1) / kStripeRows);
    plan.cluster = cluster;
    plan.stage_tiles = tactic.stage_tiles;
    // clusters do not fill every group of multiprocessors: count on a few less
    const int clusters =
        cluster == 1 ? device.multiprocessors : std::max(1, device.multiprocessors / (4 * cluster) * 4);
    const int units = clusters * tactic.blocks;
    plan.slices = slices_of(tactic, plan, units);
    plan.groups = std::clamp(divide_up(plan.stripes, units), 1, tactic.warps / plan.slices);
    plan.warps = plan.slices * plan.groups;
    plan.rounds = divide_up(plan.stripes, plan.groups * units);
    plan.grid = divide_up(plan.stripes, plan.groups * plan.rounds);

    const int m = int(p.m), block_tiles = (plan.tiles + cluster - 1) / cluster + 1;
    // 64 bytes over a multiple of 128, so that two tokens' chunks fall into different banks
    plan.x_bytes = round_up(int64_t(block_tiles) * plan.depth * 2, 128) + 64;
    int64_t at = kXAt + int64_t(m) * plan.x_bytes;
    plan.sums_at = int(at = round_up(at, 16));
    if (p.weight_dtype == TRTLLM_INT4) at += int64_t(block_tiles) * (128 / p.group) * 32;
    plan.reduce_at = int(at);
    at += 2 * plan.warps * m * 16 * 4;
    plan.result_at = int(at);
    if (cluster > 1) at += int64_t(plan.rounds) * plan.groups * m * 16 * 4;
    plan.ring_at = int(at = round_up(at, 128));
    at += int64_t(plan.warps) * kStages * plan.stage_tiles * plan.tile_bytes;
    if (at > device.shared_bytes || at * tactic.blocks > device.shared_bytes + 1024) return false;
    plan.shared_bytes = int(at);
    return true;
}

// As measured on an H200 for the four products of 8B Llama, 1 to 8 tokens, int8 and int4 in groups of 128; dense and
// small weights as on an H100.
const Tactic& tactic_of(const trtllm_weight_only_gemm_params& p) {
    if (p.tactic > 0 && p.tactic <= kTacticCount) return kTactics[p.tactic - 1];
    if (!packed(p) || p.n * p.k < (8 << 20)) return kTactics[0];
    const bool deep = p.k >= 8192;
    // few tokens of much depth fit beside the weights only in two of a cluster's blocks, many in none of these ways
    if (deep && p.m > 4) return kTactics[2];
    if (deep && p.m > 2) return kTactics[9];
    if (p.weight_dtype == TRTLLM_INT4) return kTactics[p.m <= 4 ? 2 : 9];
    return kTactics[deep ? 2 : p.m <= 4 ? 5 : 9];
}

// The smallest cluster that holds its share of the tokens; larger ones where the tokens' copies would weigh on L2 or
// where there are fewer stripes than multiprocessors.
bool plan_for(const trtllm_weight_only_gemm_params& p, const Device& device, GemvPlan& plan) {
    const Tactic& tactic = tactic_of(p);
    const int largest = device.clusters ? 8 : 1;
    const int64_t x_bytes = p.m * p.k * 2;
    const int64_t stripe_count = (p.n + kStripeRows - 1) / kStripeRows;
    int cluster = 1;
    while (cluster < largest && (x_bytes / cluster > tactic.token_kib * 1024 ||
                                 (stripe_count * cluster * 2 <= device.multiprocessors && p.k / cluster >= 1024))) {
        cluster *= 2;
    }
    for (; cluster <= largest; cluster *= 2) {
        if (cut(p, tactic, device, cluster, plan)) return true;
        for (const Tactic& other : {Tactic{16, 1, 1, 0}, Tactic{8, 1, 1, 0}, Tactic{4, 1, 1, 0}}) {
            if (cut(p, other, device, cluster, plan)) return true;
        }
    }
    return false;
}

const void* kernel_of(const trtllm_weight_only_gemm_params& p) {
    if (p.weight_dtype == TRTLLM_INT4) return gemv_int4_kernel(p.dtype, p.group);
    if (packed(p)) return gemv_8bit_kernel(p.dtype, p.weight_dtype);
    return gemv_dense_kernel(p.dtype);
}

int shared_limit() {
    int device = 0, bytes = 0;
    if (cudaGetDevice(&device) != cudaSuccess) return 0;
    cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    return bytes;
}

// What GPUs of a capability offer, for `supports` without one.
Device device_of(int compute_capability) {
    const bool large = compute_capability == 90 || compute_capability / 10 == 10;
    const int kib = large ? 227 : compute_capability == 80 || compute_capability == 87 ? 163 : 99;
    return {large ? 132 : 108, kib * 1024, compute_capability >= 90};
}

}  // namespace

cudaError_t gemv_supports(const trtllm_weight_only_gemm_params& p, int compute_capability) {
    if (p.tactic > kTacticCount) {
        return refuse(cudaErrorInvalidValue, "weight_only_gemm has tactics 1 to %d for %d tokens, not %d", kTacticCount,
                      int(p.m), p.tactic);
    }
    // where not all tokens fit, they go in several launches: one must fit
    trtllm_weight_only_gemm_params one = p;
    one.m = 1;
    const Device device = device_of(compute_capability);
    GemvPlan plan;
    if (!plan_for(one, device, plan)) {
        return refuse(cudaErrorInvalidValue,
                      "weight_only_gemm cannot hold a token of %lld inputs in shared memory: split K",
                      static_cast<long long>(p.k));
    }
    return cudaSuccess;
}

int64_t gemv_workspace_bytes(const trtllm_weight_only_gemm_params&) { return 0; }

cudaError_t gemv(const trtllm_weight_only_gemm_params& p, cudaStream_t stream) {
    const void* kernel = kernel_of(p);
    cudaFuncAttributes attributes;
    if (cudaFuncGetAttributes(&attributes, kernel) != cudaSuccess) return launched("weight_only_gemm");
    // code compiled for an older GPU, and translated for this one, knows no clusters
    const Device device{multiprocessors(), shared_limit(), attributes.ptxVersion >= 90};
    GemvPlan plan;
    int64_t tokens = p.m;
    trtllm_weight_only_gemm_params part = p;
    while (!plan_for(part, device, plan)) {
        if (tokens == 1) {
            return refuse(cudaErrorInvalidValue,
                          "weight_only_gemm cannot hold a token of %lld inputs in shared memory: split K",
                          static_cast<long long>(p.k));
        }
        part.m = tokens = (tokens + 1) / 2;
    }
    const int element = 2;
    for (int64_t first = 0; first < p.m; first += tokens) {
        part = p;
        part.m = std::min(tokens, p.m - first);
        part.x = static_cast<const char*>(p.x) + first * p.x_stride * element;
        part.out = static_cast<char*>(p.out) + first * p.out_stride * element;
        if (p.residual != nullptr) {
            part.residual = static_cast<const char*>(p.residual) + first * p.residual_stride * element;
        }
        if (!plan_for(part, device, plan)) return cudaErrorUnknown;
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, plan.shared_bytes);
        cudaLaunchAttribute with[2];
        cudaLaunchConfig_t config{};
        config.gridDim = dim3(unsigned(plan.grid * plan.cluster));
        config.blockDim = dim3(unsigned(plan.warps * 32));
        config.dynamicSmemBytes = size_t(plan.shared_bytes);
        config.stream = stream;
        config.attrs = with;
        if (plan.cluster > 1) {
            with[config.numAttrs].id = cudaLaunchAttributeClusterDimension;
            with[config.numAttrs++].val.clusterDim = {unsigned(plan.cluster), 1, 1};
        }
        if (p.pdl && device.clusters) {
            with[config.numAttrs].id = cudaLaunchAttributeProgrammaticStreamSerialization;
            with[config.numAttrs++].val.programmaticStreamSerializationAllowed = 1;
        }
        void* arguments[] = {&part, &plan};
        cudaLaunchKernelExC(&config, kernel, arguments);
        const cudaError_t code = launched("weight_only_gemm");
        if (code != cudaSuccess) return code;
    }
    return cudaSuccess;
}

}  // namespace trtllm::weight_only
