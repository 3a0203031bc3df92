// RMS and layer norm with residual add, and quantization of activations: one pass over memory, the row in registers.
#include "rows.cuh"
#include "trtllm_kernels/pointwise.h"

namespace trtllm::pointwise {
namespace {

const Capability capability(
    R"({"kernel": "norm", "family": "pointwise", "min_compute_capability": 80,
        "dtypes": ["float16", "bfloat16", "float32"], "out_dtypes": ["as x", "int8", "float8_e4m3"],
        "kinds": ["rms", "layer", "none"], "options": ["residual add", "scale a token", "static scale"]})");
const StructSize size("trtllm_norm_params", sizeof(trtllm_norm_params));

// Threads of four vectors each, which want more than the 64 registers that 1024 threads leave them.
constexpr int kWidest = 768;

// Each reduction has its own words, so that one barrier each is enough.
struct Scratch {
    float first[32], second[32], largest[32];
    float3 warps[32];
};

// Mean and sum of squared distances from it, over a row of which this thread holds `count` elements: within a warp by
// two passes, between warps by what each knows of its own (Chan, Golub, LeVeque, 1979), so that one barrier is enough.
template <typename Apart>
__device__ __forceinline__ float2 moments(float sum, int count, float width, const Apart& squared_distances,
                                          float3* shared) {
    const float n = float(__reduce_add_sync(~0u, count));
    const float nth = n > 0.0f ? __frcp_rn(n) : 0.0f, of_width = __frcp_rn(width);
    float mean = over_warp<Sum>(sum) * nth;
    const float apart = over_warp<Sum>(squared_distances(mean));
    if (blockDim.x == 32) return {mean, apart};
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    if (lane == 0) shared[warp] = {n, mean, apart};
    __syncthreads();
    const float3 part = lane < blockDim.x / 32 ? shared[lane] : float3{0.0f, 0.0f, 0.0f};
    mean = over_warp<Sum>(part.x * part.y) * of_width;
    const float off = part.y - mean;
    return {mean, over_warp<Sum>(part.z + part.x * off * off)};
}

// What a kernel knows of its parameters when it is compiled: that leaves registers for more rows at a time. A plain norm
// has its weights, no residual, and a result of x's type; the other one adds, keeps the sum, and quantizes by token.
enum class Known { kNothing, kPlainRms, kPlainLayer, kRmsResidual8 };

inline Known known_of(const trtllm_norm_params& p) {
    if (p.kind == 0 && p.gamma != nullptr && p.beta == nullptr && p.residual != nullptr && p.residual_out != nullptr &&
        p.token_scales != nullptr) {
        return Known::kRmsResidual8;
    }
    if (p.gamma == nullptr || p.residual != nullptr || p.residual_out != nullptr || is_8bit(p.out_dtype)) {
        return Known::kNothing;
    }
    if (p.kind == 0 && p.beta == nullptr) return Known::kPlainRms;
    return p.kind == 1 && p.beta != nullptr ? Known::kPlainLayer : Known::kNothing;
}

// Threads, at most, and blocks of so many together on a multiprocessor: where there are many tokens, several blocks, of
// which some load while others wait at their barriers.
template <typename T, int V, int N, int Threads, int Blocks, Known K = Known::kNothing>
__global__ void __launch_bounds__(Threads, Blocks) norm_kernel(const __grid_constant__ trtllm_norm_params given) {
    trtllm_norm_params p = given;
    if constexpr (K == Known::kRmsResidual8) {
        p.kind = 0;
        p.beta = nullptr;
        p.static_scale = nullptr;
        if (p.gamma == nullptr || p.residual == nullptr || p.residual_out == nullptr || p.token_scales == nullptr ||
            (p.out_dtype != TRTLLM_INT8 && p.out_dtype != TRTLLM_FLOAT8_E4M3)) {
            __builtin_unreachable();
        }
    } else if constexpr (K != Known::kNothing) {
        p.residual = p.residual_out = nullptr;
        p.static_scale = nullptr;
        p.token_scales = nullptr;
        p.out_dtype = p.dtype;
        p.kind = K == Known::kPlainLayer;
        if (K == Known::kPlainRms) p.beta = nullptr;
        if (p.gamma == nullptr || (K == Known::kPlainLayer && p.beta == nullptr)) __builtin_unreachable();
    }
    __shared__ Scratch scratch;
    const int64_t row = blockIdx.x * int64_t(blockDim.y) + threadIdx.y;
    // a row of a block of several is one warp's, which meets no barrier
    if (row >= p.tokens) return;
    const int width = int(p.width);
    const T* gamma = static_cast<const T*>(p.gamma);
    const T* beta = static_cast<const T*>(p.beta);
    // early, while the kernel before still ends; the longest rows and many blocks have no registers for it
    constexpr bool kEarly = N <= 2 && Blocks == 1;
    Pack<T, V> weights[kEarly ? N : 1];
#pragma unroll
    for (int n = 0; kEarly && n < N; ++n) {
        const int at = int(threadIdx.x + n * blockDim.x) * V;
        if (gamma != nullptr && at < width) weights[n] = load<T, V>(gamma + at);
    }
    ptx::wait_for_previous_kernel();
    ptx::let_next_kernel_start();

    const T* x = static_cast<const T*>(p.x) + row * p.x_stride;
    const T* residual = static_cast<const T*>(p.residual) + row * p.residual_stride;
    Pack<T, V> held[N], more[N];
#pragma unroll
    for (int n = 0; n < N; ++n) {
        const int at = int(threadIdx.x + n * blockDim.x) * V;
        if (at < width) {
            held[n] = load<T, V>(x + at);
            if (p.residual != nullptr) more[n] = load<T, V>(residual + at);
        }
    }
    float sum = 0.0f;
#pragma unroll
    for (int n = 0; n < N; ++n) {
        const int at = int(threadIdx.x + n * blockDim.x) * V;
        if (at >= width) continue;
        float h[V];
        widen<T, V>(h, held[n]);
        if (p.residual != nullptr) {
            float plus[V];
            widen<T, V>(plus, more[n]);
#pragma unroll
            for (int i = 0; i < V; ++i) plus[i] += h[i];
            held[n] = rounded<T, V>(plus);
            widen<T, V>(h, held[n]);
        }
        if (p.residual_out != nullptr) {
            T* kept = static_cast<T*>(p.residual_out) + row * p.residual_out_stride;
            *reinterpret_cast<Pack<T, V>*>(kept + at) = held[n];
        }
#pragma unroll
        for (int i = 0; i < V; ++i) sum += p.kind == 1 ? h[i] : h[i] * h[i];
    }
    float mean = 0.0f, factor = 1.0f;
    if (p.kind == 0) factor = rsqrtf(over_row<Sum>(sum, scratch.first) / float(width) + p.eps);
    if (p.kind == 1) {
        int count = 0;
#pragma unroll
        for (int n = 0; n < N; ++n) count += int(threadIdx.x + n * blockDim.x) * V < width ? V : 0;
        const auto squared_distances = [&](float from) {
            float apart = 0.0f;
#pragma unroll
            for (int n = 0; n < N; ++n) {
                if (int(threadIdx.x + n * blockDim.x) * V >= width) continue;
                float h[V];
                widen<T, V>(h, held[n]);
#pragma unroll
                for (int i = 0; i < V; ++i) apart += (h[i] - from) * (h[i] - from);
            }
            return apart;
        };
        const float2 found = moments(sum, count, float(width), squared_distances, scratch.warps);
        mean = found.x;
        factor = rsqrtf(found.y / float(width) + p.eps);
    }
    const auto value = [&](int n, float(&y)[V]) {
        widen<T, V>(y, held[n]);
        if (p.kind == 2) return;
        const int at = int(threadIdx.x + n * blockDim.x) * V;
        float w[V], b[V];
        if (gamma != nullptr) widen<T, V>(w, kEarly ? weights[kEarly ? n : 0] : load<T, V>(gamma + at));
        if (beta != nullptr) widen<T, V>(b, load<T, V>(beta + at));
#pragma unroll
        for (int i = 0; i < V; ++i) {
            y[i] = (y[i] - mean) * factor;
            if (gamma != nullptr) y[i] *= w[i] + p.gamma_offset;
            if (beta != nullptr) y[i] += b[i];
        }
    };
    write_row<T, V, N>(value, row, width, p.out, p.out_stride, p.out_dtype, p.static_scale, p.token_scales,
                       scratch.largest);
}

// Rows too long for registers, and odd ones of more than 4096: read again for each pass, from the L2 cache.
template <typename T>
__global__ void __launch_bounds__(1024) norm_long_kernel(const __grid_constant__ trtllm_norm_params p) {
    __shared__ Scratch scratch;
    ptx::wait_for_previous_kernel();
    ptx::let_next_kernel_start();
    const int64_t row = blockIdx.x;
    const T* x = static_cast<const T*>(p.x) + row * p.x_stride;
    const T* residual = p.residual == nullptr ? nullptr : static_cast<const T*>(p.residual) + row * p.residual_stride;
    T* kept = p.residual_out == nullptr ? nullptr : static_cast<T*>(p.residual_out) + row * p.residual_out_stride;
    const T* gamma = static_cast<const T*>(p.gamma);
    const T* beta = static_cast<const T*>(p.beta);
    float sum = 0.0f;
    for (int64_t i = threadIdx.x; i < p.width; i += blockDim.x) {
        const T h = residual == nullptr ? x[i] : T(float(x[i]) + float(residual[i]));
        if (kept != nullptr) kept[i] = h;
        sum += p.kind == 1 ? float(h) : float(h) * float(h);
    }
    // a thread reads again only what it wrote itself, so `kept` may be x or residual
    const auto value = [&](int64_t i) {
        return kept != nullptr       ? float(kept[i])
               : residual == nullptr ? float(x[i])
                                     : float(T(float(x[i]) + float(residual[i])));
    };
    float mean = 0.0f, factor = 1.0f;
    if (p.kind != 2) {
        float squares = over_row<Sum>(sum, scratch.first);
        if (p.kind == 1) {
            mean = squares / float(p.width);
            float apart = 0.0f;
            for (int64_t i = threadIdx.x; i < p.width; i += blockDim.x) apart += (value(i) - mean) * (value(i) - mean);
            squares = over_row<Sum>(apart, scratch.second);
        }
        factor = rsqrtf(squares / float(p.width) + p.eps);
    }
    const auto normed = [&](int64_t i) {
        float y = (value(i) - mean) * factor;
        if (p.kind != 2 && gamma != nullptr) y *= float(gamma[i]) + p.gamma_offset;
        if (p.kind != 2 && beta != nullptr) y += float(beta[i]);
        return y;
    };
    write_long_row<T>(normed, row, p.width, p.out, p.out_stride, p.out_dtype, p.static_scale, p.token_scales,
                      scratch.largest);
}

// Quantization alone needs fewer registers, so more rows are on their way.
template <typename T, int V, int N>
__global__ void __launch_bounds__(512, 3) quantize_kernel(const __grid_constant__ trtllm_norm_params p) {
    __shared__ float largest[32];
    const int64_t row = blockIdx.x * int64_t(blockDim.y) + threadIdx.y;
    if (row >= p.tokens) return;
    ptx::wait_for_previous_kernel();
    ptx::let_next_kernel_start();
    const T* x = static_cast<const T*>(p.x) + row * p.x_stride;
    Pack<T, V> held[N];
#pragma unroll
    for (int n = 0; n < N; ++n) {
        const int at = int(threadIdx.x + n * blockDim.x) * V;
        if (at < p.width) held[n] = load<T, V>(x + at);
    }
    const auto value = [&](int n, float(&y)[V]) { widen<T, V>(y, held[n]); };
    write_row<T, V, N>(value, row, int(p.width), p.out, p.out_stride, p.out_dtype, p.static_scale, p.token_scales,
                       largest);
}

// False where the rows want other kernels.
template <typename T>
bool launch_quantize(const trtllm_norm_params& p, cudaStream_t stream) {
    constexpr int V = kVector<T>;
    const RowShape shape = row_shape(p.tokens, p.width / V);
    if (shape.vectors == 0 || shape.block.x * shape.block.y > 512) return false;
    launch(shape.vectors == 1   ? quantize_kernel<T, V, 1>
           : shape.vectors == 2 ? quantize_kernel<T, V, 2>
                                : quantize_kernel<T, V, 4>,
           p, shape.grid, shape.block, stream, p.pdl != 0);
    return true;
}

template <typename T>
void launch_norm(const trtllm_norm_params& p, cudaStream_t stream) {
    constexpr int V = kVector<T>;
    const bool fits = p.width % V == 0 && aligned(p.x, p.x_stride, sizeof(T), 16) &&
                      aligned(p.residual, p.residual_stride, sizeof(T), 16) && aligned(p.gamma, 0, sizeof(T), 16) &&
                      aligned(p.beta, 0, sizeof(T), 16) &&
                      aligned(p.residual_out, p.residual_out_stride, sizeof(T), 16) &&
                      aligned(p.out, p.out_stride, bytes_of(trtllm_dtype(p.out_dtype)),
                              V * bytes_of(trtllm_dtype(p.out_dtype)));
    if (p.kind == 2 && p.residual == nullptr && p.residual_out == nullptr && is_8bit(p.out_dtype) && fits) {
        if (launch_quantize<T>(p, stream)) return;
    }
    const RowShape shape = row_shape(p.tokens, fits ? p.width / V : p.width, fits ? kWidest : 1024, 128);
    const unsigned threads = shape.block.x * shape.block.y;
    const bool many = p.tokens > 2 * multiprocessors() && threads <= 256;
    constexpr int kBlocks = std::is_same_v<T, __half> ? 4 : 5;  // as many as leave registers enough
    void (*kernel)(trtllm_norm_params) = norm_long_kernel<T>;
    if (fits && shape.vectors == 1) kernel = many ? norm_kernel<T, V, 1, 256, kBlocks> : norm_kernel<T, V, 1, 1024, 1>;
    if (fits && shape.vectors == 2) kernel = many ? norm_kernel<T, V, 2, 256, kBlocks> : norm_kernel<T, V, 2, 1024, 1>;
    if (fits && shape.vectors == 4) {
        kernel = many && threads <= 128 ? norm_kernel<T, V, 4, 128, 7>
                 : threads <= 448       ? norm_kernel<T, V, 4, 448, 2>
                                        : norm_kernel<T, V, 4, kWidest, 1>;
    }
    const Known known = known_of(p);
    if (fits && many && threads <= 128 && known == Known::kRmsResidual8) {
        if (shape.vectors == 4) kernel = norm_kernel<T, V, 4, 128, 8, Known::kRmsResidual8>;
    } else if (fits && many && threads <= 128 && known != Known::kNothing) {
        const bool rms = known == Known::kPlainRms;
        if (shape.vectors == 2) {
            kernel = rms ? norm_kernel<T, V, 2, 128, 12, Known::kPlainRms>
                         : norm_kernel<T, V, 2, 128, 10, Known::kPlainLayer>;
        }
        if (shape.vectors == 4) {
            kernel = rms ? norm_kernel<T, V, 4, 128, 10, Known::kPlainRms>
                         : norm_kernel<T, V, 4, 128, 10, Known::kPlainLayer>;
        }
    }
    if (!fits && shape.vectors != 0) kernel = norm_kernel<T, 1, 4, 1024, 1>;
    launch(kernel, p, shape.grid, shape.block, stream, p.pdl != 0);
}

}  // namespace
}  // namespace trtllm::pointwise

extern "C" int trtllm_norm_supports(const trtllm_norm_params* p, int compute_capability) {
    using namespace trtllm;
    using namespace trtllm::pointwise;
    if (const auto code = check_gpu("norm", compute_capability)) return code;
    if (const auto code = check_types("norm", p->dtype, p->out_dtype)) return code;
    if (const auto code = check_sizes("norm", p->tokens, p->width)) return code;
    if (p->kind < 0 || p->kind > 2) {
        return refuse(cudaErrorInvalidValue, "norm knows kinds 0 (rms), 1 (layer) and 2 (none), not %d", p->kind);
    }
    return cudaSuccess;
}

extern "C" int trtllm_norm(const trtllm_norm_params* p, trtllm_stream stream) {
    using namespace trtllm;
    using namespace trtllm::pointwise;
    if (const int code = trtllm_norm_supports(p, compute_capability())) return code;
    if (const auto code = check_scales("norm", p->out_dtype, p->static_scale, p->token_scales)) return code;
    if (p->tokens == 0 || p->width == 0) return cudaSuccess;
    if (const auto code = check_pointer("norm", "x", p->x)) return code;
    if (const auto code = check_pointer("norm", "out", p->out)) return code;
    const auto on = static_cast<cudaStream_t>(stream);
    if (p->dtype == TRTLLM_FLOAT16) launch_norm<__half>(*p, on);
    if (p->dtype == TRTLLM_BFLOAT16) launch_norm<__nv_bfloat16>(*p, on);
    if (p->dtype == TRTLLM_FLOAT32) launch_norm<float>(*p, on);
    return launched("norm");
}
