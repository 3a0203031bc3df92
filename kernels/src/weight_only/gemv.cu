// Host side of the products for few tokens: how a launch is cut over the GPU.
#include <algorithm>

#include "registry.hpp"
#include "weight_only_gemv.cuh"
#include "weight_only_gemv_launch.hpp"

namespace trtllm::weight_only {
namespace {

struct Tactic {
    int warps;       // a block, at most
    int chunk;       // tiles in a stage of a warp's ring
    int token_kib;   // of shared memory for the tokens; more are split over a cluster
    int least;       // cluster
    bool all;        // the multiprocessor's shared memory, not half of it
    int batch;       // rounds of one token whose sums wait for one barrier
};
// Tactics are these thrice: with activations in the form that their number suggests, as they are, and scaled.
constexpr Tactic kTactics[] = {{16, 1, 64, 1, false, 8},  {16, 2, 64, 1, false, 8}, {8, 2, 64, 1, false, 8},
                               {8, 4, 64, 1, false, 8},   {16, 2, 120, 1, true, 8}, {16, 2, 64, 1, false, 4},
                               {16, 2, 64, 1, false, 16}, {16, 2, 64, 1, false, 1}, {16, 2, 64, 2, false, 8},
                               {16, 1, 120, 1, true, 8}};
constexpr int kTacticCount = sizeof kTactics / sizeof kTactics[0];

struct Device {
    int multiprocessors;
    int shared_bytes;  // a block may ask for
    int half_bytes;    // two blocks of a multiprocessor may
    bool clusters;
};

constexpr int round_up(int64_t value, int to) { return int((value + to - 1) / to * to); }
constexpr int divide_up(int64_t value, int64_t by) { return int((value + by - 1) / by); }

// How many of a block's warps share a stripe. Many where stripes are few; else so few that a warp has two kilobytes of
// each stripe, as long as that leaves no more multiprocessors idle in the last round.
int slices_of(const Tactic& tactic, const GemvPlan& plan, int cluster, int units) {
    int slices = 1;
    while (slices * 2 <= tactic.warps && slices * 2 * cluster <= plan.tiles) slices *= 2;
    const int alone = divide_up(plan.stripes, units);
    while (slices > 1 && int64_t(plan.tiles) * plan.tile_bytes < 2048 * slices * cluster) {
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
    const bool dense = !packed(p), int4 = p.weight_dtype == TRTLLM_INT4;
    const int depth = dense ? 128 : tile_depth(p.weight_dtype);
    plan.tile_bytes = dense ? kDenseTileBytes : tile_bytes(p.weight_dtype, p.group, p.has_zero != 0);
    plan.tiles = divide_up(p.k, depth);
    plan.stripes = divide_up(p.n, kStripeRows);
    plan.chunk_tiles = dense ? 1 : tactic.chunk;
    // clusters do not fill every group of multiprocessors: count on a few less
    const int clusters =
        cluster == 1 ? device.multiprocessors : std::max(1, device.multiprocessors / (4 * cluster) * 4);
    const int slices = slices_of(tactic, plan, cluster, clusters);
    plan.groups = std::clamp(divide_up(plan.stripes, clusters), 1, tactic.warps / slices);
    plan.warps = slices * plan.groups;
    while (1 << plan.slices_log < slices) ++plan.slices_log;
    while (1 << plan.cluster_log < cluster) ++plan.cluster_log;
    const int units = divide_up(plan.stripes, plan.groups);
    plan.grid = std::min(units, clusters);
    plan.rounds = units / plan.grid, plan.rounds_rest = units % plan.grid;

    plan.token_inverse = 65536u / unsigned(p.m) + 1, plan.inverse_k = 1.0f / float(p.k);
    const int m = int(p.m), block_tiles = divide_up(plan.tiles, cluster);
    if (int64_t(block_tiles) * depth * 2 > device.shared_bytes) return false;
    const int outputs = plan.groups * m * 16, most_rounds = divide_up(units, plan.grid);
    plan.row_log = 5;
    while (2 << plan.row_log <= plan.warps * 32 && 1 << plan.row_log < block_tiles * depth / 8) ++plan.row_log;
    plan.batch = std::clamp(tactic.batch / m, 1, most_rounds);
    // 16 bytes over a multiple of 128, so that eight tokens' chunks fall into different banks
    plan.x_bytes = round_up(int64_t(block_tiles) * depth * 2, 128) + 16;
    int64_t at = kXAt + int64_t(m) * plan.x_bytes;
    plan.records_at = int(at = round_up(at, 16));
    at += int64_t(block_tiles) * 32 * (int4 ? 128 / p.group + 1 : dense ? 0 : 2);
    plan.reduce_at = int(at);
    at += int64_t(2 * plan.batch) * plan.warps * m * 16 * 4;
    plan.result_at = int(at);
    if (cluster > 1) at += int64_t(most_rounds) * cluster * outputs * 4;
    plan.ring_at = int(at = round_up(at, 128));
    const int64_t stage = int64_t(plan.warps) * plan.chunk_tiles * plan.tile_bytes;
    const int64_t needed = int64_t(divide_up(divide_up(plan.tiles, slices * cluster), plan.chunk_tiles)) * most_rounds;
    int64_t stages = ((tactic.all ? device.shared_bytes : device.half_bytes) - at) / stage;
    if (stages < std::min<int64_t>(needed, 2)) stages = std::min<int64_t>((device.shared_bytes - at) / stage, 4);
    if (at > device.shared_bytes || stages < 1) return false;
    plan.stages = int(std::min<int64_t>({stages, needed, kMostStages}));
    plan.shared_bytes = int(at + plan.stages * stage);
    return true;
}

// As measured on an H200 for the four products of 8B Llama with 1, 2, 4 and 8 tokens: an index of kTactics.
int tactic_of(const trtllm_weight_only_gemm_params& p) {
    if (p.tactic > 0) return (p.tactic - 1) % kTacticCount;
    const bool deep = p.k >= 8192, large = p.n * p.k > (32 << 20);
    if (!packed(p)) return p.m <= 2 ? 9 : p.m <= 4 ? (deep ? 1 : 9) : (deep ? 9 : 8);
    if (p.m <= 4) return large ? 6 : 0;
    return deep ? 4 : large || p.weight_dtype != TRTLLM_INT4 ? 6 : 8;
}

// The smallest cluster that holds its share of the tokens; larger ones where the tokens' copies would weigh on L2 or
// where there are fewer stripes than multiprocessors.
bool plan_for(const trtllm_weight_only_gemm_params& p, const Device& device, GemvPlan& plan) {
    Tactic tactic = kTactics[tactic_of(p)];
    if (!packed(p)) tactic.warps = std::min(tactic.warps, kDenseWarps);
    const int largest = device.clusters ? 8 : 1;
    const int64_t x_bytes = p.m * p.k * 2;
    const int64_t stripe_count = (p.n + kStripeRows - 1) / kStripeRows;
    int cluster = 1;
    while (cluster < largest && (cluster < tactic.least || x_bytes / cluster > tactic.token_kib * 1024 ||
                                 (stripe_count * cluster * 2 <= device.multiprocessors && p.k / cluster >= 1024))) {
        cluster *= 2;
    }
    for (; cluster <= largest; cluster *= 2) {
        for (int warps = tactic.warps; warps >= 4; warps /= 2) {
            for (int chunk = tactic.chunk; chunk >= 1; chunk /= 2) {
                Tactic other = tactic;
                other.warps = warps, other.chunk = chunk;
                if (cut(p, other, device, cluster, plan)) return true;
            }
        }
    }
    return false;
}

// Few tokens are worth converting to float16, more of them where there are many weights: those take fewer instructions.
Form form_of(const trtllm_weight_only_gemm_params& p, const GemvPlan& plan) {
    if (plan.cluster_log > 0) return Form::kCluster;
    if (p.tactic > kTacticCount) return p.tactic > 2 * kTacticCount ? Form::kScaled : Form::kPlain;
    const bool deep = p.k >= 8192, large = p.n * p.k > (32 << 20);
    const bool scaled = p.weight_dtype == TRTLLM_INT4 ? p.m <= 2 || (large && !deep) : p.m == 1 && !deep;
    return scaled ? Form::kScaled : Form::kPlain;
}

const void* kernel_of(const trtllm_weight_only_gemm_params& p, Form form) {
    if (p.weight_dtype == TRTLLM_INT4) return gemv_int4_kernel(p.dtype, p.group, form);
    if (packed(p)) return gemv_8bit_kernel(p.dtype, p.weight_dtype, form);
    return gemv_dense_kernel(p.dtype, form);
}

Device this_device(bool clusters) {
    int device = 0, bytes = 0, all = 0;
    if (cudaGetDevice(&device) == cudaSuccess) {
        cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
        cudaDeviceGetAttribute(&all, cudaDevAttrMaxSharedMemoryPerMultiprocessor, device);
    }
    return {multiprocessors(), bytes, all / 2 - 1024, clusters};
}

// What GPUs of a capability offer, for `supports` without one.
Device device_of(int compute_capability) {
    const bool large = compute_capability == 90 || compute_capability / 10 == 10;
    const int kib = large ? 227 : compute_capability == 80 || compute_capability == 87 ? 163 : 99;
    return {large ? 132 : 108, kib * 1024, (kib + 1) * 512 - 1024, compute_capability >= 90};
}

}  // namespace

cudaError_t gemv_supports(const trtllm_weight_only_gemm_params& p, int compute_capability) {
    if (p.tactic > 3 * kTacticCount) {
        return refuse(cudaErrorInvalidValue, "weight_only_gemm has tactics 1 to %d for %d tokens, not %d",
                      3 * kTacticCount, int(p.m), p.tactic);
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
    cudaFuncAttributes attributes;
    if (cudaFuncGetAttributes(&attributes, kernel_of(p, Form::kPlain)) != cudaSuccess) {
        return launched("weight_only_gemm");
    }
    // code compiled for an older GPU, and translated for this one, knows no clusters
    const Device device = this_device(attributes.ptxVersion >= 90);
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
        const void* kernel = kernel_of(part, form_of(part, plan));
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, plan.shared_bytes);
        // half of what a multiprocessor has is asked for, so that the next launch's blocks find the other
        cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared);
        cudaLaunchAttribute with[2];
        cudaLaunchConfig_t config{};
        config.gridDim = dim3(unsigned(plan.grid << plan.cluster_log));
        config.blockDim = dim3(unsigned(plan.warps * 32));
        config.dynamicSmemBytes = size_t(plan.shared_bytes);
        config.stream = stream;
        config.attrs = with;
        if (plan.cluster_log > 0) {
            with[config.numAttrs].id = cudaLaunchAttributeClusterDimension;
            with[config.numAttrs++].val.clusterDim = {1u << plan.cluster_log, 1, 1};
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
