// Argument checks and launch of the sampling kernel.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "argmax.cuh"
#include "kernel.cuh"
#include "registry.hpp"

namespace trtllm::sampling {
namespace {

const Capability capability(
    R"({"kernel": "sampling", "family": "sampling", "min_compute_capability": 80,
        "dtypes": ["float16", "bfloat16", "float32"], "max_vocab": 4194304,
        "options": ["argmax", "temperature", "top-k", "top-p", "min-p", "repetition, frequency and presence penalties",
                    "seed and step a request"], "faster_from": 90})");
const StructSize size("trtllm_sampling_params", sizeof(trtllm_sampling_params));

constexpr int kMaxVocab = 1 << 22;

// Clusters of 16 blocks are not portable: some GPUs of these generations have them.
bool wide_clusters(int compute_capability) { return compute_capability == 90 || compute_capability == 100; }

// Thread blocks a row where the caller leaves that open: few rows are spread further, many fill the GPU by themselves.
int blocks_of(const trtllm_sampling_params& p, bool greedy) {
    if (compute_capability() < 90) return 1;
    const bool few = p.batch * 16 <= multiprocessors() && wide_clusters(compute_capability());
    const int most = few ? 16 : greedy && p.batch > 32 ? 2 : 8;
    int blocks = 1;
    while (blocks < most && p.vocab > 4096 * blocks) blocks *= 2;
    return blocks;
}

template <typename... Arguments>
cudaError_t launch_on(void (*kernel)(trtllm_sampling_params, Arguments...), size_t bytes, cudaStream_t stream,
                      const trtllm_sampling_params& p, Arguments... arguments) {
    auto code = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(bytes));
    if (code == cudaSuccess && p.cluster > 8) {
        code = cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
    }
    if (code != cudaSuccess) {
        return refuse(code, "sampling could not get %zu bytes of shared memory in %d blocks a row: %s", bytes, p.cluster,
                      cudaGetErrorString(code));
    }
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(unsigned(p.batch) * unsigned(p.cluster));
    config.blockDim = dim3(kThreads);
    config.dynamicSmemBytes = bytes;
    config.stream = stream;
    cudaLaunchAttribute attributes[2] = {};
    if (p.cluster > 1) {
        attributes[config.numAttrs].id = cudaLaunchAttributeClusterDimension;
        attributes[config.numAttrs++].val.clusterDim = {unsigned(p.cluster), 1, 1};
    }
    if (p.pdl && compute_capability() >= 90) {
        attributes[config.numAttrs].id = cudaLaunchAttributeProgrammaticStreamSerialization;
        attributes[config.numAttrs++].val.programmaticStreamSerializationAllowed = 1;
    }
    config.attrs = attributes;
    cudaLaunchKernelEx(&config, kernel, p, arguments...);
    return launched("sampling");
}

template <typename T>
cudaError_t launch(trtllm_sampling_params p, cudaStream_t stream) {
    const bool penalties = p.repetition != nullptr || p.frequency != nullptr || p.presence != nullptr;
    const bool greedy = p.temperature == nullptr && !penalties;
    if (p.cluster == 0) p.cluster = blocks_of(p, greedy);
    constexpr int V = 16 / int(sizeof(T));
    if (greedy) {
        // as many rows as leave a block alone on its SM want more of them on their way
        const bool alone = p.batch > 32 && p.batch * p.cluster <= multiprocessors();
        return launch_on(alone ? argmax_kernel<T, V == 4 ? 8 : 6> : argmax_kernel<T, 4>, 0, stream, p);
    }
    // a row that does not start at 16 bytes has up to V - 1 slots before it
    const int a_block = (p.vocab + V - 1 + p.cluster - 1) / p.cluster;
    const int slots = (a_block + kSlotStep - 1) / kSlotStep * kSlotStep;
    int device = 0, most = 0;
    cudaGetDevice(&device);
    cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    const size_t all = sizeof(Shared) + sizeof(float) * size_t(slots);
    const bool kept = p.temperature != nullptr && all <= size_t(most);
    return kept ? launch_on(sampling_kernel<T, true>, all, stream, p, slots)
                : launch_on(sampling_kernel<T, false>, sizeof(Shared), stream, p, slots);
}

}  // namespace
}  // namespace trtllm::sampling

extern "C" int trtllm_sampling_supports(const trtllm_sampling_params* p, int compute_capability) {
    using namespace trtllm;
    if (compute_capability < 80) {
        return refuse(cudaErrorInvalidDeviceFunction,
                      "sampling needs compute capability 8.0, this GPU has %d.%d: sample on the CPU",
                      compute_capability / 10, compute_capability % 10);
    }
    if (p->dtype != TRTLLM_FLOAT16 && p->dtype != TRTLLM_BFLOAT16 && p->dtype != TRTLLM_FLOAT32) {
        return refuse(cudaErrorInvalidValue, "sampling takes logits of float16, bfloat16 or float32, not %s",
                      name_of(trtllm_dtype(p->dtype)));
    }
    if (p->vocab < 1 || p->vocab > sampling::kMaxVocab || p->batch < 0 || p->batch > (1 << 24)) {
        return refuse(cudaErrorInvalidValue,
                      "sampling takes up to 16777216 rows of 1 to %d logits, not %d rows of %d: split the batch",
                      sampling::kMaxVocab, p->batch, p->vocab);
    }
    const int n = p->cluster;
    const int most = sampling::wide_clusters(compute_capability) ? 16 : compute_capability >= 90 ? 8 : 1;
    if (n < 0 || n > most || (n & (n - 1)) != 0) {
        return refuse(cudaErrorInvalidValue,
                      "sampling spreads a row over 1, 2, 4, 8 or 16 thread blocks, up to %d on %d.%d, not over %d: pass 0",
                      most, compute_capability / 10, compute_capability % 10, n);
    }
    return cudaSuccess;
}

extern "C" int trtllm_sampling(const trtllm_sampling_params* p, trtllm_stream stream) {
    using namespace trtllm;
    if (const int code = trtllm_sampling_supports(p, compute_capability())) return code;
    if (p->batch == 0) return cudaSuccess;
    if (p->logits == nullptr || p->tokens == nullptr) {
        return refuse(cudaErrorInvalidValue, "sampling needs logits and tokens, one is a null pointer: pass device pointers");
    }
    if (reinterpret_cast<uintptr_t>(p->logits) % bytes_of(trtllm_dtype(p->dtype)) != 0) {
        return refuse(cudaErrorInvalidValue, "sampling needs logits aligned to their type %s: copy them",
                      name_of(trtllm_dtype(p->dtype)));
    }
    if (p->counts == nullptr && (p->repetition != nullptr || p->frequency != nullptr || p->presence != nullptr)) {
        return refuse(cudaErrorInvalidValue, "sampling with penalties needs the counts of tokens seen: pass counts");
    }
    const auto on = static_cast<cudaStream_t>(stream);
    if (p->dtype == TRTLLM_FLOAT16) return sampling::launch<__half>(*p, on);
    if (p->dtype == TRTLLM_BFLOAT16) return sampling::launch<__nv_bfloat16>(*p, on);
    return sampling::launch<float>(*p, on);
}
