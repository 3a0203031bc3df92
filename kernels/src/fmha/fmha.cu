// The launcher of context attention: checks, and the choice between the portable kernels and Hopper's.
#include <cuda_runtime.h>

#include <cstdint>

#include "fmha_launch.hpp"
#include "registry.hpp"

namespace trtllm {
namespace {

const Capability capability(
    R"({"kernel": "fmha", "family": "fmha", "min_compute_capability": 80, "dtypes": ["float16", "bfloat16"],
        "head_sizes": [64, 80, 96, 128, 256], "page_sizes": [16, 32, 64, 128],
        "features": ["causal", "full", "packed", "paged", "grouped", "window", "soft_cap", "alibi", "log_sum_exp",
                     "float16 sums"]})");
const StructSize size("trtllm_fmha_params", sizeof(trtllm_fmha_params));

// Where float32 sums run at the rate of float16 ones (8.0, 9.0, 10.0) narrow sums would only lose digits, so whoever lets
// the library choose gets wide ones; the portable kernel asked for by name takes the wish as it is.
bool half_sums(const trtllm_fmha_params& p) {
    const int capability = compute_capability();
    return p.half_sums && (p.kernel == 1 || (capability != 80 && capability != 90 && capability != 100));
}

bool aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

}  // namespace
}  // namespace trtllm

extern "C" int trtllm_fmha_supports(const trtllm_fmha_params* p, int capability) {
    using namespace trtllm;
    constexpr auto invalid = cudaErrorInvalidValue;
    if (capability < 80) {
        return refuse(cudaErrorInvalidDeviceFunction,
                      "fmha needs compute capability 8.0, this GPU has %d.%d: use torch's attention", capability / 10,
                      capability % 10);
    }
    if (p->dtype != TRTLLM_FLOAT16 && p->dtype != TRTLLM_BFLOAT16) {
        return refuse(invalid, "fmha takes float16 or bfloat16, not %s: convert q, k and v",
                      name_of(trtllm_dtype(p->dtype)));
    }
    if (p->head_size != 64 && p->head_size != 80 && p->head_size != 96 && p->head_size != 128 && p->head_size != 256) {
        return refuse(invalid, "fmha knows head sizes 64, 80, 96, 128 and 256, not %d: pad to the next one with zeros",
                      p->head_size);
    }
    if (p->heads < 1 || p->kv_heads < 1 || p->heads % p->kv_heads != 0 || p->heads > 65535) {
        return refuse(invalid, "fmha needs heads a multiple of kv_heads and at most 65535, not %d and %d", p->heads,
                      p->kv_heads);
    }
    if (p->batch < 0 || p->batch > 65535) {
        return refuse(invalid, "fmha takes at most 65535 sequences a call, not %d: split the batch", p->batch);
    }
    if (p->q_tokens < 0 || p->kv_tokens < 0 || p->num_pages < 0 || p->q_tokens > INT32_MAX || p->kv_tokens > INT32_MAX) {
        return refuse(invalid, "fmha takes 0 to 2^31 - 1 tokens, not %lld queries and %lld keys",
                      static_cast<long long>(p->q_tokens), static_cast<long long>(p->kv_tokens));
    }
    if (p->max_q_length < 0 || p->max_q_length > p->q_tokens) {
        return refuse(invalid, "fmha needs max_q_length between 0 and the %lld rows of q, not %d",
                      static_cast<long long>(p->q_tokens), p->max_q_length);
    }
    if (int64_t(p->batch) * p->heads * (p->max_q_length / 64 + 1) > INT32_MAX) {
        return refuse(invalid, "fmha cannot count batch %d x heads %d x max_q_length %d: split the batch", p->batch,
                      p->heads, p->max_q_length);
    }
    if (p->page_size != 0 && p->page_size != 16 && p->page_size != 32 && p->page_size != 64 && p->page_size != 128) {
        return refuse(invalid, "fmha knows pages of 16, 32, 64 and 128 positions, not %d", p->page_size);
    }
    if (p->window < 0 || (p->window > 0 && !p->causal)) {
        return refuse(invalid, "fmha takes a window of at least 0 (0: none) with the causal mask, not %d %s", p->window,
                      p->causal ? "with it" : "without it");
    }
    if (!(p->scale > 0.0f) || !(p->soft_cap >= 0.0f)) {
        return refuse(invalid, "fmha needs a scale above 0 and a soft cap of at least 0 (0: none), not %g and %g",
                      double(p->scale), double(p->soft_cap));
    }
    if (p->half_sums && p->dtype != TRTLLM_FLOAT16) {
        return refuse(invalid, "fmha sums in float16 only for float16, not %s: leave half_sums off",
                      name_of(trtllm_dtype(p->dtype)));
    }
    if (p->half_sums && p->kernel == 2) {
        return refuse(invalid,
                      "fmha's kernel 2 sums in float32, which this GPU does at the rate of float16: leave half_sums off, or "
                      "ask for kernel 1");
    }
    if (p->kernel < 0 || p->kernel > 2) {
        return refuse(invalid, "fmha knows kernels 0 (the best one), 1 (portable) and 2 (Hopper's), not %d", p->kernel);
    }
    if (p->kernel == 2 && (capability != 90 || !fmha::hopper_was_compiled())) {
        return refuse(cudaErrorInvalidDeviceFunction,
                      "fmha's kernel 2 needs compute capability 9.0 and a library built for 90a, this GPU has %d.%d: let it "
                      "choose (0)", capability / 10, capability % 10);
    }
    const int64_t strides[] = {p->q_token_stride, p->q_head_stride, p->k_token_stride,   p->k_head_stride,
                               p->v_token_stride, p->v_head_stride, p->out_token_stride, p->out_head_stride,
                               p->k_page_stride,  p->v_page_stride};
    for (const int64_t stride : strides) {
        if (stride % 8 != 0 || stride < 0) {
            return refuse(invalid, "fmha needs strides that are multiples of 8 elements, not %lld: copy to a contiguous tensor",
                          static_cast<long long>(stride));
        }
    }
    return cudaSuccess;
}

// A counter from which Hopper's persistent blocks take their next tile.
extern "C" int64_t trtllm_fmha_workspace_bytes(const trtllm_fmha_params*) { return sizeof(int32_t); }

extern "C" int trtllm_fmha(const trtllm_fmha_params* p, trtllm_stream stream) {
    using namespace trtllm;
    const int refused = trtllm_fmha_supports(p, compute_capability());
    if (refused != cudaSuccess) return refused;
    if (p->q_tokens == 0 || p->batch == 0 || p->max_q_length == 0) return cudaSuccess;
    if (!aligned(p->q) || !aligned(p->k) || !aligned(p->v) || !aligned(p->out)) {
        return refuse(cudaErrorInvalidValue, "fmha needs q, k, v and out aligned to 16 bytes: copy to a new tensor");
    }
    if (p->q_starts == nullptr || (p->page_size == 0) != (p->page_table == nullptr) ||
        (p->page_size != 0 ? p->kv_lengths == nullptr : p->kv_starts == nullptr)) {
        return refuse(cudaErrorInvalidValue,
                      "fmha needs q_starts, and kv_starts (packed) or a page size, page_table and kv_lengths (paged)");
    }
    if (p->workspace != nullptr && reinterpret_cast<uintptr_t>(p->workspace) % 4 != 0) {
        return refuse(cudaErrorInvalidValue, "fmha needs a workspace aligned to 4 bytes");
    }
    const auto on = static_cast<cudaStream_t>(stream);
    const bool hopper = p->kernel == 2 || (p->kernel == 0 && compute_capability() == 90 && fmha::hopper_was_compiled());
    const auto run = hopper                         ? fmha::launch_hopper
                     : p->dtype == TRTLLM_BFLOAT16 ? fmha::launch_portable_bfloat16
                     : half_sums(*p)               ? fmha::launch_portable_half_sums
                                                   : fmha::launch_portable_half;
    const cudaError_t code = run(*p, on);
    if (code != cudaSuccess) {
        return refuse(code, "fmha could not be launched for head size %d: %s", p->head_size, cudaGetErrorString(code));
    }
    return launched("fmha");
}
