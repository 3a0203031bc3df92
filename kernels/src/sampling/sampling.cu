// Argument checks and launch of the sampling kernel.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

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

template <typename T>
cudaError_t launch(trtllm_sampling_params p, cudaStream_t stream) {
    const bool clusters = compute_capability() >= 90;
    if (p.cluster == 0) {
        p.cluster = !clusters ? 1 : p.vocab > 16384 ? 8 : p.vocab > 8192 ? 4 : p.vocab > 4096 ? 2 : 1;
    }
    constexpr int V = 16 / int(sizeof(T));
    // a row that does not start at 16 bytes has up to V - 1 slots before it
    const int a_block = (p.vocab + V - 1 + p.cluster - 1) / p.cluster;
    const int slots = (a_block + kListed - 1) / kListed * kListed;
    int device = 0, most = 0;
    cudaGetDevice(&device);
    cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    const size_t all = sizeof(Shared) + sizeof(float) * size_t(slots);
    const bool kept = p.temperature != nullptr && all <= size_t(most);
    const size_t bytes = kept ? all : sizeof(Shared);
    const auto code = cudaFuncSetAttribute(sampling_kernel<T>, cudaFuncAttributeMaxDynamicSharedMemorySize, int(bytes));
    if (code != cudaSuccess) {
        return refuse(code, "sampling could not get %zu bytes of shared memory: %s", bytes, cudaGetErrorString(code));
    }
    if (p.cluster > 8) cudaFuncSetAttribute(sampling_kernel<T>, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
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
    if (p.pdl && clusters) {
        attributes[config.numAttrs].id = cudaLaunchAttributeProgrammaticStreamSerialization;
        attributes[config.numAttrs++].val.programmaticStreamSerializationAllowed = 1;
    }
    config.attrs = attributes;
    cudaLaunchKernelEx(&config, sampling_kernel<T>, p, slots, kept);
    return launched("sampling");
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
    const bool known = p->cluster == 0 || p->cluster == 1 || p->cluster == 2 || p->cluster == 4 || p->cluster == 8 || p->cluster == 16;
    if (!known || (p->cluster > 1 && compute_capability < 90)) {
        return refuse(cudaErrorInvalidValue,
                      "sampling spreads a row over 1, or from compute capability 9.0 over 2, 4 or 8 thread blocks, not %d "
                      "on %d.%d: pass 0",
                      p->cluster, compute_capability / 10, compute_capability % 10);
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
