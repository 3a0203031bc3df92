// The launcher of decoder layers: checks, and how a step is cut over the GPU.
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>

#include "decode_layer.hpp"
#include "registry.hpp"
#include "weight_only.hpp"

namespace trtllm::decode_layer {
namespace {

constexpr auto kInvalid = cudaErrorInvalidValue;
constexpr int kHopperBlocks = 132;
constexpr int kHopperShared = 227 * 1024;

const Capability capability(
    R"({"kernel": "decode_layer", "family": "decode_layer", "min_compute_capability": 90,
        "dtypes": ["float16", "bfloat16"], "weights": ["int4", "int8", "float8_e4m3", "float16", "bfloat16"],
        "groups": [32, 64, 128], "zeros": true, "head_sizes": [64, 128], "page_sizes": [16, 32, 64, 128],
        "cache_dtypes": ["as x"], "max_hidden": 8192, "max_batch": 1,
        "features": ["paged", "grouped", "rotary", "bias of qkv", "several layers"]})");
const StructSize row_size("trtllm_decode_layer_row", sizeof(trtllm_decode_layer_row));
const StructSize size("trtllm_decode_layer_params", sizeof(trtllm_decode_layer_params));

bool dense(const trtllm_decode_layer_params& p) { return p.weight_dtype == p.dtype; }
int depth(const trtllm_decode_layer_params& p) { return dense(p) ? 64 : weight_only::tile_depth(p.weight_dtype); }
int64_t up(int64_t value, int64_t to) { return (value + to - 1) / to * to; }

// False where a block's share does not fit.
bool cut(const trtllm_decode_layer_params& p, int blocks, int shared_bytes, Plan& plan) {
    plan = {};
    plan.grid = blocks;
    const int64_t rows[] = {int64_t(p.heads + 2 * p.kv_heads) * p.head_size, p.hidden, 2 * int64_t(p.wide), p.hidden};
    const int64_t inputs[] = {p.hidden, int64_t(p.heads) * p.head_size, p.hidden, p.wide};
    plan.tile_bytes = dense(p) ? 2048 : weight_only::tile_bytes(p.weight_dtype, p.group, p.has_zero != 0);
    // a buffer of the block holds two tiles of weights or one of keys for each warp
    const int rings = dense(p) ? kWarps : 1;
    plan.threads = kThreads + (dense(p) ? 0 : 32);
    plan.slot_bytes = dense(p) ? plan.tile_bytes : kWarps * std::max(2 * plan.tile_bytes, kTileBytes);
    int most_tiles = 0, most_stripes = 0;
    for (int i = 0; i < kProducts; ++i) {
        plan.inputs[i] = int(inputs[i]);
        plan.tiles[i] = int((inputs[i] + depth(p) - 1) / depth(p));
        plan.stripes[i] = int(rows[i] / 16);
        plan.stripe_step[i] = blocks * (dense(p) ? 32 * plan.inputs[i] : plan.tiles[i] * plan.tile_bytes);
        most_tiles = std::max(most_tiles, plan.tiles[i]);
        most_stripes = std::max(most_stripes, (plan.stripes[i] + blocks - 1) / blocks);
    }
    plan.splits = std::clamp(blocks / p.kv_heads, 1, kMostSplits);
    plan.page_shift = __builtin_ctz(unsigned(p.page_size));
    plan.block_tiles = (p.block_keys > 0 ? p.block_keys : 128) / tile_keys(p.head_size);

    int64_t at = kScratchBytes;
    plan.query_at = int(at);
    at += query_bytes(p.head_size);
    plan.x_at = int(at = up(at, 128));
    at += int64_t(most_tiles) * depth(p) * 2;
    plan.sums_at = int(at);
    if (p.weight_dtype == TRTLLM_INT4) at += int64_t(most_tiles) * (128 / p.group) * 32;
    // A product's sums may still be read while the next one adds: two places in turn. Attention's lie where the
    // products have their inputs and o its sums, of which nobody reads then.
    const auto sums = [&](int one, int other) {
        plan.reduce_at[one] = plan.reduce_at[other] = int(at);
        at += int64_t((std::max(plan.stripes[one], plan.stripes[other]) + blocks - 1) / blocks) * kReducePitch * 4;
    };
    sums(1, 3);
    at = std::max<int64_t>(at, plan.x_at + attention_bytes(p.head_size));
    sums(0, 2);
    plan.ring_at = int(at = up(at, 128));
    plan.slots = int(std::min<int64_t>((shared_bytes - at) / (rings * plan.slot_bytes), kMostSlots));
    plan.shared_bytes = int(at + int64_t(plan.slots) * rings * plan.slot_bytes);

    int64_t memory = 256;  // Counters
    const auto take = [&](int64_t bytes) {
        const int64_t here = memory;
        memory += up(bytes, 256);
        return here;
    };
    // words of 8 bytes for two values
    plan.stream_at[0] = take(int64_t(p.hidden) * 4);
    plan.stream_at[1] = take(int64_t(p.hidden) * 4);
    plan.qkv_at = take(rows[0] * 4);
    plan.attended_at = take(inputs[1] * 4);
    plan.gated_at = take(int64_t(p.wide) * 4);
    plan.parts_at = take(int64_t(p.kv_heads) * kMostSplits * kMostGroup * (p.head_size + 2) * 8);
    plan.workspace_bytes = memory;
    return plan.slots >= (dense(p) ? 3 : 2) && most_stripes <= kMostStripes;
}

cudaError_t check_types(const trtllm_decode_layer_params& p) {
    if (p.dtype != TRTLLM_FLOAT16 && p.dtype != TRTLLM_BFLOAT16) {
        return refuse(kInvalid, "decode_layer takes float16 or bfloat16, not %s: convert x",
                      name_of(trtllm_dtype(p.dtype)));
    }
    const bool eight = p.weight_dtype == TRTLLM_INT8 || p.weight_dtype == TRTLLM_FLOAT8_E4M3;
    if (p.weight_dtype != TRTLLM_INT4 && !eight && !dense(p)) {
        return refuse(kInvalid, "decode_layer takes int4, int8, float8_e4m3 or %s weights, not %s",
                      name_of(trtllm_dtype(p.dtype)), name_of(trtllm_dtype(p.weight_dtype)));
    }
    if (p.weight_dtype == TRTLLM_INT4 && p.group != 32 && p.group != 64 && p.group != 128) {
        return refuse(kInvalid, "decode_layer takes int4 groups of 32, 64 or 128, not %d", p.group);
    }
    return cudaSuccess;
}

cudaError_t check_shapes(const trtllm_decode_layer_params& p) {
    if (p.head_size != 64 && p.head_size != 128) {
        return refuse(kInvalid, "decode_layer knows head sizes 64 and 128, not %d: use mmha", p.head_size);
    }
    if (p.heads < 1 || p.kv_heads < 1 || p.heads % p.kv_heads != 0 || p.heads / p.kv_heads > kMostGroup ||
        p.kv_heads > 128) {
        return refuse(kInvalid,
                      "decode_layer needs 1 to 8 heads for each of at most 128 kv heads, not %d over %d: use mmha",
                      p.heads, p.kv_heads);
    }
    if (p.hidden < 16 || p.hidden % 16 != 0 || p.hidden > 8192 || p.wide < 16 || p.wide % 16 != 0 ||
        p.wide > 1 << 17) {
        return refuse(kInvalid,
                      "decode_layer needs hidden and wide multiples of 16 and hidden at most 8192, not %d and %d: use "
                      "weight_only_gemm", p.hidden, p.wide);
    }
    if (p.weight_dtype == TRTLLM_INT4 &&
        (p.hidden % p.group != 0 || p.wide % p.group != 0 || p.heads * p.head_size % p.group != 0)) {
        return refuse(kInvalid, "decode_layer needs int4 groups of %d to divide the inputs of all products", p.group);
    }
    if (p.page_size != 16 && p.page_size != 32 && p.page_size != 64 && p.page_size != 128) {
        return refuse(kInvalid, "decode_layer knows pages of 16, 32, 64 and 128 positions, not %d", p.page_size);
    }
    if (p.page_stride < 0 || p.page_stride % 8 != 0 || p.head_stride < 0 || p.head_stride % 8 != 0) {
        return refuse(kInvalid, "decode_layer needs strides of the caches that are multiples of 8, not %lld and %lld",
                      static_cast<long long>(p.page_stride), static_cast<long long>(p.head_stride));
    }
    if (p.layers < 0 || p.max_length < 1 || p.max_length > INT32_MAX - 128 || p.rotary_positions < 1) {
        return refuse(kInvalid,
                      "decode_layer needs room for 1 position and more in the cache and in cos and sin, and 0 layers "
                      "and more, not %d, %d and %d", p.max_length, p.rotary_positions, p.layers);
    }
    if (!(p.scale > 0.0f) || p.block_keys < 0 || p.block_keys % 16 != 0) {
        return refuse(kInvalid,
                      "decode_layer needs a scale above 0 and block_keys a multiple of 16, not %g and %d",
                      double(p.scale), p.block_keys);
    }
    return cudaSuccess;
}

cudaError_t check_pointers(const trtllm_decode_layer_params& p, int64_t wanted) {
    for (const void* pointer : {p.x, static_cast<const void*>(p.out), static_cast<const void*>(p.workspace)}) {
        if (pointer == nullptr || reinterpret_cast<uintptr_t>(pointer) % 16 != 0) {
            return refuse(kInvalid, "decode_layer needs x, out and workspace, aligned to 16 bytes");
        }
    }
    if (p.table == nullptr || p.page_table == nullptr || p.lengths == nullptr || p.cos == nullptr ||
        p.sin == nullptr || p.failed == nullptr) {
        return refuse(kInvalid,
                      "decode_layer needs table, page_table, lengths, cos, sin and failed, and one of them is null");
    }
    if (p.workspace_bytes < wanted) {
        return refuse(kInvalid, "decode_layer needs a workspace of %lld zeroed bytes, not %lld",
                      static_cast<long long>(wanted), static_cast<long long>(p.workspace_bytes));
    }
    return cudaSuccess;
}

cudaError_t refuse_size(const trtllm_decode_layer_params& p) {
    return refuse(kInvalid,
                  "decode_layer cannot hold a block's share of a layer of %d hidden and %d wide in shared memory: use "
                  "weight_only_gemm and mmha", p.hidden, p.wide);
}

const void* kernel_of(const trtllm_decode_layer_params& p) {
    if (p.weight_dtype == TRTLLM_INT4) return int4_kernel(p.dtype, p.group, p.head_size);
    if (dense(p)) return dense_kernel(p.dtype, p.head_size);
    return eight_kernel(p.dtype, p.weight_dtype, p.head_size);
}

int shared_limit() {
    int device = 0, bytes = 0;
    if (cudaGetDevice(&device) != cudaSuccess) return 0;
    cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    return bytes;
}

}  // namespace
}  // namespace trtllm::decode_layer

extern "C" int64_t trtllm_decode_layer_workspace_bytes(const trtllm_decode_layer_params* p) {
    using namespace trtllm::decode_layer;
    if (p->kv_heads < 1) return 0;
    Plan plan;
    cut(*p, kHopperBlocks, kHopperShared, plan);
    return plan.workspace_bytes;  // the same for every grid
}

extern "C" int trtllm_decode_layer_supports(const trtllm_decode_layer_params* p, int compute_capability) {
    using namespace trtllm;
    using namespace trtllm::decode_layer;
    if (compute_capability < 90) {
        return refuse(cudaErrorInvalidDeviceFunction,
                      "decode_layer needs compute capability 9.0, this GPU has %d.%d: use weight_only_gemm and mmha",
                      compute_capability / 10, compute_capability % 10);
    }
    for (const auto check : {check_types, check_shapes}) {
        const cudaError_t refused = check(*p);
        if (refused != cudaSuccess) return refused;
    }
    Plan plan;
    const bool large = compute_capability == 90 || compute_capability / 10 == 10;
    return cut(*p, kHopperBlocks, large ? kHopperShared : 99 * 1024, plan) ? cudaSuccess : refuse_size(*p);
}

extern "C" int trtllm_decode_layer(const trtllm_decode_layer_params* p, trtllm_stream stream) {
    using namespace trtllm;
    using namespace trtllm::decode_layer;
    int refused = trtllm_decode_layer_supports(p, compute_capability());
    if (refused != cudaSuccess) return refused;
    Plan plan;
    if (!cut(*p, multiprocessors(), shared_limit(), plan)) return refuse_size(*p);
    refused = check_pointers(*p, plan.workspace_bytes);
    if (refused != cudaSuccess) return refused;
    if (p->layers == 0) {
        return p->out == p->x ? cudaSuccess
                              : int(cudaMemcpyAsync(p->out, p->x, size_t(p->hidden) * 2, cudaMemcpyDeviceToDevice,
                                                    static_cast<cudaStream_t>(stream)));
    }
    const void* kernel = kernel_of(*p);
    cudaFuncAttributes attributes;
    if (cudaFuncGetAttributes(&attributes, kernel) != cudaSuccess) return launched("decode_layer");
    if (attributes.ptxVersion < 90) {
        return refuse(cudaErrorInvalidDeviceFunction,
                      "decode_layer was compiled for compute capability %d.%d and needs 9.0: build the library for "
                      "this GPU", attributes.ptxVersion / 10, attributes.ptxVersion % 10);
    }
    cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, plan.shared_bytes);
    cudaLaunchAttribute with[2];
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(unsigned(plan.grid));
    config.blockDim = dim3(unsigned(plan.threads));
    config.dynamicSmemBytes = size_t(plan.shared_bytes);
    config.stream = static_cast<cudaStream_t>(stream);
    config.attrs = with;
    with[config.numAttrs].id = cudaLaunchAttributeCooperative;
    with[config.numAttrs++].val.cooperative = 1;
    if (p->pdl) {
        with[config.numAttrs].id = cudaLaunchAttributeProgrammaticStreamSerialization;
        with[config.numAttrs++].val.programmaticStreamSerializationAllowed = 1;
    }
    trtllm_decode_layer_params params = *p;
    void* arguments[] = {&params, &plan};
    cudaLaunchKernelExC(&config, kernel, arguments);
    return launched("decode_layer");
}
