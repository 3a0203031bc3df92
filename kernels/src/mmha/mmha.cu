// The launcher of generation attention: checks, scratch memory, choice by the cache's type.
#include <cuda_runtime.h>

#include <cstdint>

#include "mmha_launch.hpp"
#include "registry.hpp"

namespace trtllm {
namespace {

const Capability capability(
    R"({"kernel": "mmha", "family": "mmha", "min_compute_capability": 80, "dtypes": ["float16", "bfloat16"],
        "cache_dtypes": ["as q", "int8", "float8_e4m3"], "head_sizes": [64, 80, 96, 128, 256],
        "page_sizes": [16, 32, 64, 128], "max_new_tokens": 8,
        "features": ["paged", "grouped", "split", "window", "soft_cap", "alibi", "append", "norm of q and k",
                     "rotary"]})");
const StructSize size("trtllm_mmha_params", sizeof(trtllm_mmha_params));

constexpr auto kInvalid = cudaErrorInvalidValue;

bool aligned(const void* pointer, uintptr_t bytes) { return reinterpret_cast<uintptr_t>(pointer) % bytes == 0; }

cudaError_t check_shapes(const trtllm_mmha_params& p) {
    const int d = p.head_size;
    if (d != 64 && d != 80 && d != 96 && d != 128 && d != 256) {
        return refuse(kInvalid,
                      "mmha knows head sizes 64, 80, 96, 128 and 256, not %d: pad to the next one with zeros", d);
    }
    if (p.page_size != 16 && p.page_size != 32 && p.page_size != 64 && p.page_size != 128) {
        return refuse(kInvalid, "mmha knows pages of 16, 32, 64 and 128 positions, not %d", p.page_size);
    }
    if (p.heads < 1 || p.kv_heads < 1 || p.heads % p.kv_heads != 0 || p.heads > 65535) {
        return refuse(kInvalid, "mmha needs heads a multiple of kv_heads and at most 65535, not %d and %d", p.heads,
                      p.kv_heads);
    }
    if (p.q_length < 1 || p.q_length > 8) {
        return refuse(kInvalid, "mmha takes 1 to 8 new tokens a sequence, not %d: use fmha", p.q_length);
    }
    if (p.batch < 0 || p.max_length < 0) {
        return refuse(kInvalid,
                      "mmha needs a batch and a max_length of at least 0, not %d and %d", p.batch, p.max_length);
    }
    const int64_t parts = (int64_t(p.heads) / p.kv_heads * p.q_length + 7) / 8;
    if (p.max_length > INT32_MAX - 128 || int64_t(p.batch) * p.kv_heads * parts * (p.max_length / 32 + 1) > INT32_MAX) {
        return refuse(kInvalid,
                      "mmha takes at most 2^36 keys times kv heads a call, not %d sequences of %d keys for %d heads: "
                      "split the batch", p.batch, p.max_length, p.kv_heads);
    }
    return cudaSuccess;
}

cudaError_t check_options(const trtllm_mmha_params& p) {
    if (p.window < 0 || !(p.scale > 0.0f) || !(p.soft_cap >= 0.0f)) {
        return refuse(kInvalid,
                      "mmha needs a scale above 0, a window and a soft cap of at least 0 (0: none), not %g, %d and %g",
                      double(p.scale), p.window, double(p.soft_cap));
    }
    if (p.append && p.q_length != 1) {
        return refuse(kInvalid,
                      "mmha appends one new token a sequence, not %d: write the cache with rotary first", p.q_length);
    }
    if (p.append && (p.rotary_dim < 0 || p.rotary_dim > p.head_size || p.rotary_dim % 4 != 0)) {
        return refuse(kInvalid,
                      "mmha rotates a multiple of 4 elements of a head of %d, not %d: write the cache with rotary "
                      "first", p.head_size, p.rotary_dim);
    }
    if (p.append && p.rotary_dim > 0 && p.rotary_positions < 1) {
        return refuse(kInvalid, "mmha needs tables of cos and sin with at least 1 row, not %lld",
                      static_cast<long long>(p.rotary_positions));
    }
    if (p.blocks < 0 || p.blocks > mmha::kMaxGrid || (p.stages != 0 && (p.stages < 2 || p.stages > 6))) {
        return refuse(kInvalid,
                      "mmha takes 0 to %d blocks, and 0 or 2 to 6 stages, not %d and %d",
                      mmha::kMaxGrid, p.blocks, p.stages);
    }
    return cudaSuccess;
}

cudaError_t check_strides(const trtllm_mmha_params& p) {
    const int64_t bytes = int64_t(bytes_of(trtllm_dtype(p.cache_dtype)));
    const int64_t caches[] = {p.k_page_stride, p.k_head_stride, p.k_token_stride,
                              p.v_page_stride, p.v_head_stride, p.v_token_stride};
    for (const int64_t stride : caches) {
        if (stride < 0 || stride * bytes % 16 != 0) {
            return refuse(kInvalid,
                          "mmha needs strides of the caches that are multiples of 16 bytes, not %lld elements of %s",
                          static_cast<long long>(stride), name_of(trtllm_dtype(p.cache_dtype)));
        }
    }
    if (p.k_token_stride > 1 << 24 || p.v_token_stride > 1 << 24) {
        return refuse(kInvalid, "mmha takes tokens of a page at most 2^24 elements apart, not %lld",
                      static_cast<long long>(p.k_token_stride > p.v_token_stride ? p.k_token_stride : p.v_token_stride));
    }
    for (const int64_t stride : {p.q_batch_stride, p.q_token_stride, p.q_head_stride}) {
        if (stride < 0 || stride % 2 != 0) {
            return refuse(kInvalid, "mmha needs strides of q that are multiples of 2 elements, not %lld",
                          static_cast<long long>(stride));
        }
    }
    for (const int64_t stride : {p.out_batch_stride, p.out_token_stride, p.out_head_stride}) {
        if (stride < 0 || stride % 8 != 0) {
            return refuse(kInvalid, "mmha needs strides of out that are multiples of 8 elements, not %lld",
                          static_cast<long long>(stride));
        }
    }
    return cudaSuccess;
}

cudaError_t check_pointers(const trtllm_mmha_params& p) {
    if (p.q == nullptr || p.out == nullptr || p.lengths == nullptr) {
        return refuse(kInvalid, "mmha needs q, out and lengths, and one of them is null");
    }
    // where no sequence can have a key, nothing of these is read
    if (p.max_length > 0 && (p.k_cache == nullptr || p.v_cache == nullptr || p.page_table == nullptr)) {
        return refuse(kInvalid,
                      "mmha needs k_cache, v_cache and page_table for sequences of up to %d keys, and one of them is "
                      "null", p.max_length);
    }
    if (!aligned(p.q, 4) || !aligned(p.k_cache, 16) || !aligned(p.v_cache, 16) || !aligned(p.out, 16)) {
        return refuse(kInvalid, "mmha needs the caches and out aligned to 16 bytes and q to 4: copy to a new tensor");
    }
    if (bytes_of(trtllm_dtype(p.cache_dtype)) == 1 && (p.k_scale == nullptr || p.v_scale == nullptr)) {
        return refuse(kInvalid,
                      "mmha needs k_scale and v_scale for a cache of %s", name_of(trtllm_dtype(p.cache_dtype)));
    }
    if (p.append && p.rotary_dim > 0 &&
        (p.cos == nullptr || p.sin == nullptr || !aligned(p.cos, 8) || !aligned(p.sin, 8))) {
        return refuse(kInvalid, "mmha needs cos and sin aligned to 8 bytes to rotate %d elements", p.rotary_dim);
    }
    if (p.append && (!aligned(p.q_norm, 4) || !aligned(p.k_norm, 4))) {
        return refuse(kInvalid, "mmha needs q_norm and k_norm aligned to 4 bytes: copy to a new tensor");
    }
    const int64_t wanted = trtllm_mmha_workspace_bytes(&p);
    if (p.workspace == nullptr || p.workspace_bytes < wanted || !aligned(p.workspace, 16)) {
        return refuse(kInvalid, "mmha needs a workspace of %lld zeroed bytes aligned to 16, not %lld",
                      static_cast<long long>(wanted), static_cast<long long>(p.workspace_bytes));
    }
    return cudaSuccess;
}

}  // namespace
}  // namespace trtllm

extern "C" int64_t trtllm_mmha_workspace_bytes(const trtllm_mmha_params* p) {
    using namespace trtllm;
    if (p->kv_heads < 1) return 0;
    const int64_t chosen = int64_t(mmha::kMostBlocksAnSm) * multiprocessors();
    const int64_t blocks = p->blocks > chosen ? p->blocks : chosen < mmha::kMaxGrid ? chosen : mmha::kMaxGrid;
    const int64_t part = mmha::rows_of(*p) * (p->head_size + 2) * int64_t(sizeof(float));
    return 2 * blocks * part;
}

extern "C" int trtllm_mmha_supports(const trtllm_mmha_params* p, int capability) {
    using namespace trtllm;
    if (capability < 80) {
        return refuse(cudaErrorInvalidDeviceFunction,
                      "mmha needs compute capability 8.0, this GPU has %d.%d: use torch's attention", capability / 10,
                      capability % 10);
    }
    if (p->dtype != TRTLLM_FLOAT16 && p->dtype != TRTLLM_BFLOAT16) {
        return refuse(kInvalid, "mmha takes float16 or bfloat16, not %s: convert q", name_of(trtllm_dtype(p->dtype)));
    }
    if (p->cache_dtype != p->dtype && p->cache_dtype != TRTLLM_INT8 && p->cache_dtype != TRTLLM_FLOAT8_E4M3) {
        return refuse(kInvalid, "mmha reads a cache of q's type, int8 or float8_e4m3, not %s with q of %s",
                      name_of(trtllm_dtype(p->cache_dtype)), name_of(trtllm_dtype(p->dtype)));
    }
    for (const auto check : {check_shapes, check_options, check_strides}) {
        const cudaError_t refused = check(*p);
        if (refused != cudaSuccess) return refused;
    }
    return cudaSuccess;
}

extern "C" int trtllm_mmha(const trtllm_mmha_params* p, trtllm_stream stream) {
    using namespace trtllm;
    int refused = trtllm_mmha_supports(p, compute_capability());
    if (refused != cudaSuccess) return refused;
    if (p->batch == 0) return cudaSuccess;
    refused = check_pointers(*p);
    if (refused != cudaSuccess) return refused;
    const auto on = static_cast<cudaStream_t>(stream);
    const cudaError_t code = p->cache_dtype == TRTLLM_INT8          ? mmha::launch_int8(*p, on)
                             : p->cache_dtype == TRTLLM_FLOAT8_E4M3 ? mmha::launch_fp8(*p, on)
                             : p->cache_dtype == TRTLLM_FLOAT16     ? mmha::launch_half(*p, on)
                                                                    : mmha::launch_bfloat16(*p, on);
    if (code == cudaErrorInvalidConfiguration) {
        return refuse(code,
                      "mmha: this GPU's shared memory does not hold %d stages and %d blocks for head size %d: use "
                      "fewer", p->stages, p->blocks, p->head_size);
    }
    if (code != cudaSuccess) {
        return refuse(code, "mmha could not be launched for head size %d: %s", p->head_size, cudaGetErrorString(code));
    }
    return launched("mmha");
}
