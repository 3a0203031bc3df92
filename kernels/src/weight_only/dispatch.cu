// The entry of the weight-only products: checks, the choice of kernels by the number of tokens, and what many tokens
// need done to x before (gathering for act-order, the norm).
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "registry.hpp"
#include "weight_only.hpp"

namespace trtllm::weight_only {

namespace {

const Capability capability(
    R"({"kernel": "weight_only_gemm", "family": "weight_only", "min_compute_capability": 80,
        "dtypes": ["float16", "bfloat16"], "weights": ["int4", "int8", "float8_e4m3", "float16", "bfloat16"],
        "groups": [32, 64, 128], "zeros": true, "fused": ["rms_norm", "bias", "gate", "residual"],
        "gates": ["silu", "gelu", "gelu_tanh"], "programmatic_dependent_launch": 90})");
const StructSize size("trtllm_weight_only_gemm_params", sizeof(trtllm_weight_only_gemm_params));

bool prepares(const trtllm_weight_only_gemm_params& p) { return p.order != nullptr || p.norm_weight != nullptr; }

// What the tensor-core kernels ask of addresses and strides.
bool aligned(const trtllm_weight_only_gemm_params& p) {
    return reinterpret_cast<uintptr_t>(p.x) % 16 == 0 && p.x_stride % 8 == 0 &&
           reinterpret_cast<uintptr_t>(p.out) % 16 == 0;
}

// Whether wgmma is the faster way for up to 8 tokens, as measured on an H200 for the four products of 8B Llama: the
// kernels for few tokens bring the activations to every multiprocessor, which takes longer the more there are. What
// they do to x on the way takes the others a launch of its own.
bool wgmma_is_faster(const trtllm_weight_only_gemm_params& p) {
    if (prepares(p) || !aligned(p) || !packed(p)) return false;
    return p.m > 4 || (p.weight_dtype != TRTLLM_INT4 && p.m > 2 && p.n * p.k >= (24 << 20));
}

bool few(const trtllm_weight_only_gemm_params& p, int compute_capability) {
    if (p.m > kGemvTokens || p.tactic >= 100) return false;
    return p.tactic > 0 || compute_capability != 90 || !wgmma_is_faster(p);
}

int64_t prepared_bytes(const trtllm_weight_only_gemm_params& p) {
    return (p.m * ((p.k + 7) / 8 * 8) * 2 + 255) / 256 * 256;
}

// x as the tensor-core kernels take it: in the packed order, without a norm.
trtllm_weight_only_gemm_params prepared(const trtllm_weight_only_gemm_params& p) {
    trtllm_weight_only_gemm_params q = p;
    if (!prepares(p)) return q;
    q.x = p.workspace;
    q.x_stride = (p.k + 7) / 8 * 8;
    q.order = q.norm_weight = nullptr;
    q.workspace = static_cast<char*>(p.workspace) + (p.workspace == nullptr ? 0 : prepared_bytes(p));
    q.workspace_bytes = p.workspace_bytes - prepared_bytes(p);
    return q;
}

// One block a token. The sum of squares in a fixed order, the result rounded to T as the kernels for few tokens do.
template <typename T>
__global__ void prepare_kernel(trtllm_weight_only_gemm_params p, T* out, int64_t stride) {
    const T* x = static_cast<const T*>(p.x) + blockIdx.x * p.x_stride;
    const T* weight = static_cast<const T*>(p.norm_weight);
    const int32_t* order = static_cast<const int32_t*>(p.order);
    __shared__ float partial[8];
    float scale = 1.0f;
    if (weight != nullptr) {
        float sum = 0.0f;
        for (int64_t k = threadIdx.x; k < p.k; k += blockDim.x) sum += float(x[k]) * float(x[k]);
        for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(0xFFFFFFFFu, sum, step);
        if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = sum;
        __syncthreads();
        sum = 0.0f;
        for (int w = 0; w < 8; ++w) sum += partial[w];
        scale = rsqrtf(sum / float(p.k) + p.norm_eps);
    }
    for (int64_t k = threadIdx.x; k < p.k; k += blockDim.x) {
        const int64_t at = order == nullptr ? k : order[k];
        const float v = float(x[at]);
        out[blockIdx.x * stride + k] = weight == nullptr ? x[at] : T(v * scale * (p.norm_offset + float(weight[at])));
    }
}

cudaError_t common_supports(const trtllm_weight_only_gemm_params& p, int compute_capability) {
    if (compute_capability < 80) {
        return refuse(cudaErrorInvalidDeviceFunction,
                      "weight_only_gemm needs compute capability 8.0, this GPU has %d.%d: use torch",
                      compute_capability / 10, compute_capability % 10);
    }
    if (p.dtype != TRTLLM_FLOAT16 && p.dtype != TRTLLM_BFLOAT16) {
        return refuse(cudaErrorInvalidValue, "weight_only_gemm takes float16 or bfloat16 activations, not %s",
                      name_of(trtllm_dtype(p.dtype)));
    }
    const bool eight = p.weight_dtype == TRTLLM_INT8 || p.weight_dtype == TRTLLM_FLOAT8_E4M3;
    if (p.weight_dtype != TRTLLM_INT4 && !eight && p.weight_dtype != p.dtype) {
        return refuse(cudaErrorInvalidValue,
                      "weight_only_gemm takes int4, int8, float8_e4m3 or %s weights with %s activations, not %s",
                      name_of(trtllm_dtype(p.dtype)), name_of(trtllm_dtype(p.dtype)),
                      name_of(trtllm_dtype(p.weight_dtype)));
    }
    if (p.m < 0 || p.n < 1 || p.k < 1 || p.m > 2147483647 || p.n > 1073741824 || p.k > 1073741824) {
        return refuse(cudaErrorInvalidValue, "weight_only_gemm cannot multiply %lld tokens by weights [%lld, %lld]",
                      static_cast<long long>(p.m), static_cast<long long>(p.n), static_cast<long long>(p.k));
    }
    if (p.weight_dtype == TRTLLM_INT4 && ((p.group != 32 && p.group != 64 && p.group != 128) || p.k % p.group != 0)) {
        return refuse(cudaErrorInvalidValue,
                      "weight_only_gemm takes int4 groups of 32, 64 or 128 that divide K, not %d over %lld inputs",
                      p.group, static_cast<long long>(p.k));
    }
    if (p.weight_dtype == p.dtype && (p.k % 8 != 0 || p.weight_stride % 8 != 0 || p.weight_stride < p.k)) {
        return refuse(cudaErrorInvalidValue,
                      "weight_only_gemm takes dense weights with K and row stride multiples of 8, not %lld and %lld: "
                      "pad them",
                      static_cast<long long>(p.k), static_cast<long long>(p.weight_stride));
    }
    if (p.gate < 0 || p.gate > 3 || (p.gate != 0 && p.n % 16 != 0)) {
        return refuse(cudaErrorInvalidValue,
                      "weight_only_gemm knows gates 0 to 3 over rows in pairs of 8, not gate %d over %lld rows",
                      p.gate, static_cast<long long>(p.n));
    }
    if (p.tactic < 0 || (p.tactic > 0 && p.tactic < 100 && p.m > kGemvTokens)) {
        return refuse(cudaErrorInvalidValue, "weight_only_gemm has no tactic %d for %lld tokens: use 0", p.tactic,
                      static_cast<long long>(p.m));
    }
    if (p.x_stride < p.k || p.out_stride < outputs(p) || (p.residual != nullptr && p.residual_stride < outputs(p))) {
        if (p.m > 1) {
            return refuse(cudaErrorInvalidValue, "weight_only_gemm needs rows at least as far apart as they are wide");
        }
    }
    if (!few(p, compute_capability) && !packed(p)) {
        return refuse(cudaErrorInvalidValue,
                      "weight_only_gemm takes up to %d tokens with dense weights, not %lld: use cuBLAS",
                      int(kGemvTokens), static_cast<long long>(p.m));
    }
    return cudaSuccess;
}

}  // namespace
}  // namespace trtllm::weight_only

extern "C" int trtllm_weight_only_gemm_supports(const trtllm_weight_only_gemm_params* p, int compute_capability) {
    using namespace trtllm::weight_only;
    const cudaError_t refused = common_supports(*p, compute_capability);
    if (refused != cudaSuccess || p->m == 0) return refused;
    if (few(*p, compute_capability)) return gemv_supports(*p, compute_capability);
    return tensor_cores_supports(prepared(*p), compute_capability);
}

extern "C" int64_t trtllm_weight_only_gemm_workspace_bytes(const trtllm_weight_only_gemm_params* p) {
    using namespace trtllm::weight_only;
    if (p->m == 0) return 0;
    // neither kind needs any of its own for few tokens
    if (p->m <= kGemvTokens && p->tactic < 100) return gemv_workspace_bytes(*p);
    return (prepares(*p) ? prepared_bytes(*p) : 0) + tensor_cores_workspace_bytes(prepared(*p));
}

extern "C" int trtllm_weight_only_gemm(const trtllm_weight_only_gemm_params* p, trtllm_stream stream) {
    using namespace trtllm;
    using namespace trtllm::weight_only;
    const int refused = trtllm_weight_only_gemm_supports(p, compute_capability());
    if (refused != cudaSuccess || p->m == 0) return refused;
    const bool eight = p->weight_dtype == TRTLLM_INT8 || p->weight_dtype == TRTLLM_FLOAT8_E4M3;
    if (p->x == nullptr || p->weight == nullptr || p->out == nullptr || (eight && p->scale == nullptr)) {
        return refuse(cudaErrorInvalidValue, "weight_only_gemm was given no %s",
                      p->x == nullptr ? "x" : p->weight == nullptr ? "weight" : p->out == nullptr ? "out" : "scale");
    }
    if (reinterpret_cast<uintptr_t>(p->weight) % 16 != 0) {
        return refuse(cudaErrorInvalidValue, "weight_only_gemm needs weights aligned to 16 bytes");
    }
    const int64_t wanted = trtllm_weight_only_gemm_workspace_bytes(p);
    if (wanted > 0 && (p->workspace == nullptr || p->workspace_bytes < wanted)) {
        return refuse(cudaErrorInvalidValue, "weight_only_gemm needs a workspace of %lld bytes, not %lld",
                      static_cast<long long>(wanted), static_cast<long long>(p->workspace_bytes));
    }
    const auto on = static_cast<cudaStream_t>(stream);
    if (few(*p, compute_capability())) return gemv(*p, on);
    const trtllm_weight_only_gemm_params q = prepared(*p);
    if (!prepares(*p) && (reinterpret_cast<uintptr_t>(p->x) % 16 != 0 || p->x_stride % 8 != 0)) {
        return refuse(cudaErrorInvalidValue,
                      "weight_only_gemm needs x aligned to 16 bytes with rows a multiple of 8 elements "
                      "apart for %lld tokens: copy it", static_cast<long long>(p->m));
    }
    if (reinterpret_cast<uintptr_t>(p->out) % 16 != 0) {
        return refuse(cudaErrorInvalidValue, "weight_only_gemm needs out aligned to 16 bytes");
    }
    if (prepares(*p)) {
        if (p->dtype == TRTLLM_FLOAT16) {
            prepare_kernel<<<unsigned(p->m), 256, 0, on>>>(*p, static_cast<__half*>(p->workspace), q.x_stride);
        } else {
            prepare_kernel<<<unsigned(p->m), 256, 0, on>>>(*p, static_cast<__nv_bfloat16*>(p->workspace), q.x_stride);
        }
        const cudaError_t code = launched("weight_only_gemm's preparation of x");
        if (code != cudaSuccess) return code;
    }
    return tensor_cores(q, on);
}
