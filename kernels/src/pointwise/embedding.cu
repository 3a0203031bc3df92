// Rows of a table by token id, dequantized where the table is int8.
#include <cmath>

#include "launch.hpp"
#include "trtllm_kernels/pointwise.h"
#include "vectors.cuh"

namespace trtllm::pointwise {
namespace {

const Capability capability(
    R"({"kernel": "embedding", "family": "pointwise", "min_compute_capability": 80,
        "dtypes": ["float16", "bfloat16", "float32"], "table_dtypes": ["as out", "int8"], "ids": ["int32", "int64"]})");
const StructSize size("trtllm_embedding_params", sizeof(trtllm_embedding_params));

constexpr int kThreads = 128;

template <typename T, typename Stored, int V, int N>
__global__ void __launch_bounds__(kThreads) embedding_kernel(const __grid_constant__ trtllm_embedding_params p) {
    ptx::wait_for_previous_kernel();
    ptx::let_next_kernel_start();
    const int64_t token = blockIdx.x;
    const int64_t id = p.wide_ids ? static_cast<const int64_t*>(p.ids)[token] : static_cast<const int32_t*>(p.ids)[token];
    const bool known = id >= 0 && id < p.vocab;
    const Stored* row = static_cast<const Stored*>(p.table) + (known ? id : 0) * p.table_stride;
    T* out = static_cast<T*>(p.out) + token * p.out_stride;
    const int64_t start = (blockIdx.y * int64_t(N) * kThreads + threadIdx.x) * V;
    Pack<Stored, V> stored[N];
#pragma unroll
    for (int n = 0; n < N; ++n) {
        const int64_t at = start + n * kThreads * V;
        if (known && at < p.width) stored[n] = load<Stored, V>(row + at);
    }
    const float scale = known && p.row_scales != nullptr ? p.row_scales[id] * p.scale : p.scale;
#pragma unroll
    for (int n = 0; n < N; ++n) {
        const int64_t at = start + n * kThreads * V;
        if (at >= p.width) continue;
        float y[V];
        if (known) {
            widen<Stored, V>(y, stored[n]);
#pragma unroll
            for (int i = 0; i < V; ++i) y[i] *= scale;
        } else {
#pragma unroll
            for (int i = 0; i < V; ++i) y[i] = id < 0 ? 0.0f : NAN;
        }
        store<T, V>(out + at, y);
    }
}

template <typename T, typename Stored>
void launch_embedding(const trtllm_embedding_params& p, cudaStream_t stream) {
    constexpr int V = kVector<T>;
    const bool fits = p.width % V == 0 && aligned(p.table, p.table_stride, sizeof(Stored), V * sizeof(Stored)) &&
                      aligned(p.out, p.out_stride, sizeof(T), 16);
    const int64_t count = fits ? p.width / V : p.width;
    const bool many = p.tokens * count > int64_t(kThreads) * 16 * multiprocessors();
    const int n = !fits ? 4 : many ? 2 : 1;
    const dim3 grid(unsigned(p.tokens), unsigned((count + n * kThreads - 1) / (n * kThreads)));
    launch(!fits  ? embedding_kernel<T, Stored, 1, 4>
           : many ? embedding_kernel<T, Stored, V, 2>
                  : embedding_kernel<T, Stored, V, 1>,
           p, grid, dim3(kThreads), stream, p.pdl != 0);
}

template <typename T>
void launch_embedding(const trtllm_embedding_params& p, cudaStream_t stream) {
    if (p.table_dtype == TRTLLM_INT8) return launch_embedding<T, int8_t>(p, stream);
    launch_embedding<T, T>(p, stream);
}

}  // namespace
}  // namespace trtllm::pointwise

extern "C" int trtllm_embedding_supports(const trtllm_embedding_params* p, int compute_capability) {
    using namespace trtllm;
    using namespace trtllm::pointwise;
    if (const auto code = check_gpu("embedding", compute_capability)) return code;
    if (!is_float(p->dtype)) {
        return refuse(cudaErrorInvalidValue, "embedding gives float16, bfloat16 or float32, not %s",
                      name_of(trtllm_dtype(p->dtype)));
    }
    if (p->table_dtype != p->dtype && p->table_dtype != TRTLLM_INT8) {
        return refuse(cudaErrorInvalidValue, "embedding to %s takes a table of %s or int8, not %s",
                      name_of(trtllm_dtype(p->dtype)), name_of(trtllm_dtype(p->dtype)),
                      name_of(trtllm_dtype(p->table_dtype)));
    }
    if (p->vocab < 1 || p->width > 65535 * 512) {
        return refuse(cudaErrorInvalidValue, "embedding takes a table of at least one row of up to 33553920 elements, not "
                      "%lld rows of %lld", static_cast<long long>(p->vocab), static_cast<long long>(p->width));
    }
    return check_sizes("embedding", p->tokens, p->width);
}

extern "C" int trtllm_embedding(const trtllm_embedding_params* p, trtllm_stream stream) {
    using namespace trtllm;
    using namespace trtllm::pointwise;
    if (const int code = trtllm_embedding_supports(p, compute_capability())) return code;
    if (p->tokens == 0 || p->width == 0) return cudaSuccess;
    if (const auto code = check_pointer("embedding", "table", p->table)) return code;
    if (const auto code = check_pointer("embedding", "ids", p->ids)) return code;
    if (const auto code = check_pointer("embedding", "out", p->out)) return code;
    if ((p->table_dtype == TRTLLM_INT8) != (p->row_scales != nullptr)) {
        return refuse(cudaErrorInvalidValue, "embedding needs row scales for an int8 table, and takes none for a table of %s",
                      name_of(trtllm_dtype(p->dtype)));
    }
    const auto on = static_cast<cudaStream_t>(stream);
    if (p->dtype == TRTLLM_FLOAT16) launch_embedding<__half>(*p, on);
    if (p->dtype == TRTLLM_BFLOAT16) launch_embedding<__nv_bfloat16>(*p, on);
    if (p->dtype == TRTLLM_FLOAT32) launch_embedding<float>(*p, on);
    return launched("embedding");
}
