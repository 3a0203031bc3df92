// The gate of a gated MLP: out = act(gate) * up, computed in float32, with quantization of the result.
#include <cooperative_groups.h>

#include <utility>

#include "rows.cuh"
#include "trtllm_kernels/pointwise.h"

namespace trtllm::pointwise {
namespace {

const Capability capability(
    R"({"kernel": "gated", "family": "pointwise", "min_compute_capability": 80,
        "dtypes": ["float16", "bfloat16", "float32"], "out_dtypes": ["as gate", "int8", "float8_e4m3"],
        "activations": ["silu", "gelu", "gelu_tanh"], "options": ["scale a token", "static scale"]})");
const StructSize size("trtllm_gated_params", sizeof(trtllm_gated_params));

// gelu_tanh: (1 + tanh(u)) / 2 is the sigmoid of 2u.
__device__ __forceinline__ float activate(float x, int activation) {
    if (activation == 1) return 0.5f * x * (1.0f + erff(x * 0.70710678118654752f));
    const float z = activation == 0 ? x : 1.5957691216057308f * x * (1.0f + 0.044715f * x * x);
    return __fdividef(x, 1.0f + __expf(-z));
}

// ---- every element by itself: no scale, or a static one -------------------------------------------------------------

constexpr int kThreads = 256;

template <typename T, int V, int N>
__global__ void __launch_bounds__(kThreads) gated_kernel(const __grid_constant__ trtllm_gated_params p) {
    ptx::wait_for_previous_kernel();
    ptx::let_next_kernel_start();
    const int64_t token = blockIdx.x;
    const int64_t start = (blockIdx.y * int64_t(N) * kThreads + threadIdx.x) * V;
    const T* gate = static_cast<const T*>(p.gate) + token * p.gate_stride;
    const T* up = static_cast<const T*>(p.up) + token * p.up_stride;
    Pack<T, V> a[N], b[N];
#pragma unroll
    for (int n = 0; n < N; ++n) {
        const int64_t at = start + n * kThreads * V;
        if (at < p.width) {
            a[n] = load<T, V>(gate + at);
            b[n] = load<T, V>(up + at);
        }
    }
    const Divisor divided(p.static_scale == nullptr ? 1.0f : *p.static_scale);
#pragma unroll
    for (int n = 0; n < N; ++n) {
        const int64_t at = start + n * kThreads * V;
        if (at >= p.width) continue;
        float y[V], by[V];
        widen<T, V>(y, a[n]);
        widen<T, V>(by, b[n]);
#pragma unroll
        for (int i = 0; i < V; ++i) y[i] = activate(y[i], p.activation) * by[i];
        if (p.static_scale == nullptr) {
            store<T, V>(static_cast<T*>(p.out) + token * p.out_stride + at, y);
        } else {
#pragma unroll
            for (int i = 0; i < V; ++i) y[i] = divided(y[i]);
            store_8bit(static_cast<uint8_t*>(p.out) + token * p.out_stride + at, y, p.out_dtype == TRTLLM_INT8);
        }
    }
}

// ---- with a scale for each token: the row is needed whole -----------------------------------------------------------

template <typename T, int V, int N>
__global__ void __launch_bounds__(1024) gated_token_kernel(const __grid_constant__ trtllm_gated_params p) {
    __shared__ float largest[32];
    const int64_t row = blockIdx.x * int64_t(blockDim.y) + threadIdx.y;
    if (row >= p.tokens) return;
    ptx::wait_for_previous_kernel();
    ptx::let_next_kernel_start();
    const T* gate = static_cast<const T*>(p.gate) + row * p.gate_stride;
    const T* up = static_cast<const T*>(p.up) + row * p.up_stride;
    Pack<T, V> a[N], b[N];
#pragma unroll
    for (int n = 0; n < N; ++n) {
        const int at = int(threadIdx.x + n * blockDim.x) * V;
        if (at < p.width) {
            a[n] = load<T, V>(gate + at);
            b[n] = load<T, V>(up + at);
        }
    }
    float y[N][V];
#pragma unroll
    for (int n = 0; n < N; ++n) {
        const int at = int(threadIdx.x + n * blockDim.x) * V;
        if (at < p.width) {
            float by[V];
            widen<T, V>(y[n], a[n]);
            widen<T, V>(by, b[n]);
#pragma unroll
            for (int i = 0; i < V; ++i) y[n][i] = activate(y[n][i], p.activation) * by[i];
        } else {
#pragma unroll
            for (int i = 0; i < V; ++i) y[n][i] = 0.0f;
        }
    }
    const auto value = [&](int n, float(&to)[V]) {
#pragma unroll
        for (int i = 0; i < V; ++i) to[i] = y[n][i];
    };
    write_row<T, V, N>(value, row, int(p.width), p.out, p.out_stride, p.out_dtype, nullptr, p.token_scales, largest);
}

// Many tokens (compute capability 9.0): each block works through rows of its own, and while it works on one, the next
// are on their way to shared memory. Without that, loads would rest whenever a block meets to find its row's scale.
constexpr int kStreamRows = 3;

template <typename T, int V, int N>
__global__ void __launch_bounds__(1024) gated_stream_kernel(const __grid_constant__ trtllm_gated_params p) {
#if __CUDA_ARCH__ >= 900
    extern __shared__ __align__(16) unsigned char rows[];
    __shared__ float largest[2][32];
    __shared__ uint64_t arrived[kStreamRows];
    const int width = int(p.width), bytes = width * int(sizeof(T));
    const auto gate = [&](int slot) { return reinterpret_cast<T*>(rows + size_t(slot) * 2 * bytes); };
    const auto fetch = [&](int64_t row, int slot) {
        ptx::barrier_expect(&arrived[slot], uint32_t(2 * bytes));
        ptx::copy_bulk(gate(slot), static_cast<const T*>(p.gate) + row * p.gate_stride, bytes, &arrived[slot]);
        ptx::copy_bulk(gate(slot) + width, static_cast<const T*>(p.up) + row * p.up_stride, bytes, &arrived[slot]);
    };
    if (threadIdx.x == 0) {
        for (int slot = 0; slot < kStreamRows; ++slot) ptx::barrier_init(&arrived[slot], 1);
        ptx::barrier_init_fence();
    }
    __syncthreads();
    ptx::wait_for_previous_kernel();
    ptx::let_next_kernel_start();
    if (threadIdx.x == 0) {
        for (int slot = 0; slot < kStreamRows; ++slot) {
            const int64_t row = blockIdx.x + int64_t(slot) * gridDim.x;
            if (row < p.tokens) fetch(row, slot);
        }
    }
    const bool int8 = p.out_dtype == TRTLLM_INT8;
    int slot = 0, turn = 0;
    uint32_t parity = 0;
    for (int64_t row = blockIdx.x; row < p.tokens; row += gridDim.x) {
        ptx::barrier_wait(&arrived[slot], parity);
        const T* from = gate(slot);
        float y[N][V];
        float most = 0.0f;
#pragma unroll
        for (int n = 0; n < N; ++n) {
            const int at = int(threadIdx.x + n * blockDim.x) * V;
            if (at >= width) continue;
            float by[V];
            widen<T, V>(y[n], load<T, V>(from + at));
            widen<T, V>(by, load<T, V>(from + width + at));
#pragma unroll
            for (int i = 0; i < V; ++i) {
                y[n][i] = activate(y[n][i], p.activation) * by[i];
                most = fmaxf(most, fabsf(y[n][i]));
            }
        }
        const float scale = token_scale(over_row<Largest>(most, largest[turn]), int8);
        // everybody has read the row by now
        if (threadIdx.x == 0) {
            p.token_scales[row] = scale;
            const int64_t next = row + int64_t(kStreamRows) * gridDim.x;
            if (next < p.tokens) fetch(next, slot);
        }
        const Divisor divided(scale);
#pragma unroll
        for (int n = 0; n < N; ++n) {
            const int at = int(threadIdx.x + n * blockDim.x) * V;
            if (at >= width) continue;
#pragma unroll
            for (int i = 0; i < V; ++i) y[n][i] = divided(y[n][i]);
            store_8bit(static_cast<uint8_t*>(p.out) + row * p.out_stride + at, y[n], int8);
        }
        turn ^= 1;
        if (++slot == kStreamRows) {
            slot = 0;
            parity ^= 1;
        }
    }
#endif
}

// A few tokens: each over a cluster of blocks, since the exponentials of a row would keep one multiprocessor busy for
// longer than all else takes.
template <typename T, int V>
__global__ void __launch_bounds__(kThreads) gated_cluster_kernel(const __grid_constant__ trtllm_gated_params p) {
#if __CUDA_ARCH__ >= 900
    __shared__ float largest[32], of_blocks[8];
    __shared__ uint64_t all_here;  // the largest of each block has come
    const unsigned blocks = gridDim.x;
    auto cluster = cooperative_groups::this_cluster();
    if (threadIdx.x == 0) {
        ptx::barrier_init(&all_here, 1);
        ptx::barrier_init_fence();
        ptx::barrier_expect(&all_here, uint32_t(blocks * sizeof(float)));
    }
    cluster.barrier_arrive();  // waited for before the first word goes to a neighbour, who must have started by then
    ptx::wait_for_previous_kernel();
    ptx::let_next_kernel_start();
    const int64_t row = blockIdx.y;
    const int at = int(blockIdx.x * kThreads + threadIdx.x) * V;
    float y[V] = {};
    float most = 0.0f;
    if (at < p.width) {
        const Pack<T, V> gate = load<T, V>(static_cast<const T*>(p.gate) + row * p.gate_stride + at);
        const Pack<T, V> up = load<T, V>(static_cast<const T*>(p.up) + row * p.up_stride + at);
        float by[V];
        widen<T, V>(y, gate);
        widen<T, V>(by, up);
#pragma unroll
        for (int i = 0; i < V; ++i) {
            y[i] = activate(y[i], p.activation) * by[i];
            most = fmaxf(most, fabsf(y[i]));
        }
    }
    most = over_row<Largest>(most, largest);
    cluster.barrier_wait();
    // a block has all words only when its neighbours have sent theirs, so none ends before words for it have come
    if (threadIdx.x < blocks) ptx::store_in_block(&of_blocks[blockIdx.x], most, &all_here, threadIdx.x);
    ptx::barrier_wait(&all_here, 0);
    for (unsigned i = 0; i < blocks; ++i) most = fmaxf(most, of_blocks[i]);
    const bool int8 = p.out_dtype == TRTLLM_INT8;
    const float scale = token_scale(most, int8);
    if (at == 0) p.token_scales[row] = scale;
    if (at >= p.width) return;
    const Divisor divided(scale);
#pragma unroll
    for (int i = 0; i < V; ++i) y[i] = divided(y[i]);
    store_8bit(static_cast<uint8_t*>(p.out) + row * p.out_stride + at, y, int8);
#endif
}

template <typename T>
__global__ void __launch_bounds__(1024) gated_long_kernel(const __grid_constant__ trtllm_gated_params p) {
    __shared__ float largest[32];
    ptx::wait_for_previous_kernel();
    ptx::let_next_kernel_start();
    const int64_t row = blockIdx.x;
    const T* gate = static_cast<const T*>(p.gate) + row * p.gate_stride;
    const T* up = static_cast<const T*>(p.up) + row * p.up_stride;
    const auto value = [&](int64_t i) { return activate(float(gate[i]), p.activation) * float(up[i]); };
    write_long_row<T>(value, row, p.width, p.out, p.out_stride, p.out_dtype, nullptr, p.token_scales, largest);
}

template <typename T>
void launch_gated(const trtllm_gated_params& p, cudaStream_t stream) {
    constexpr int V = kVector<T>;
    const size_t out_bytes = bytes_of(trtllm_dtype(p.out_dtype));
    const bool fits = p.width % V == 0 && aligned(p.gate, p.gate_stride, sizeof(T), 16) &&
                      aligned(p.up, p.up_stride, sizeof(T), 16) &&
                      aligned(p.out, p.out_stride, out_bytes, V * out_bytes);
    const int64_t count = fits ? p.width / V : p.width;
    if (p.token_scales != nullptr) {
        const int64_t blocks = (count + kThreads - 1) / kThreads;
        if (fits && blocks > 1 && blocks <= 8 && p.tokens * blocks <= multiprocessors() && compute_capability() >= 90) {
            return launch(gated_cluster_kernel<T, V>, p, dim3(unsigned(blocks), unsigned(p.tokens)), dim3(kThreads),
                          stream, p.pdl != 0, unsigned(blocks));
        }
        // rows of three quarters to all of a block's two vectors a thread, so that none of its warps is idle
        const size_t stream_bytes = size_t(kStreamRows) * 2 * p.width * sizeof(T);
        if (fits && count > 768 && count <= 2048 && p.tokens > 8 * multiprocessors() && compute_capability() >= 90 &&
            stream_bytes + 1024 <= most_shared_bytes()) {  // and some for what is static
            const auto kernel = gated_stream_kernel<T, V, 2>;
            cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(stream_bytes));
            const unsigned threads = unsigned(count + 63) / 64 * 32;
            return launch(kernel, p, dim3(unsigned(multiprocessors())), dim3(threads), stream, p.pdl != 0, 1, stream_bytes);
        }
        const RowShape shape = row_shape(p.tokens, count);
        void (*kernel)(trtllm_gated_params) = gated_long_kernel<T>;
        if (fits && shape.vectors == 1) kernel = gated_token_kernel<T, V, 1>;
        if (fits && shape.vectors == 2) kernel = gated_token_kernel<T, V, 2>;
        if (fits && shape.vectors == 4) kernel = gated_token_kernel<T, V, 4>;
        if (!fits && shape.vectors != 0) kernel = gated_token_kernel<T, 1, 4>;
        return launch(kernel, p, shape.grid, shape.block, stream, p.pdl != 0);
    }
    // few tokens: spread them over as many multiprocessors as there are; many: two vectors a thread
    const bool many = p.tokens * count > int64_t(kThreads) * 8 * multiprocessors();
    const int n = !fits ? 4 : many ? 2 : 1;
    const dim3 grid(unsigned(p.tokens), unsigned((count + n * kThreads - 1) / (n * kThreads)));
    launch(!fits  ? gated_kernel<T, 1, 4>
           : many ? gated_kernel<T, V, 2>
                  : gated_kernel<T, V, 1>,
           p, grid, dim3(kThreads), stream, p.pdl != 0);
}

}  // namespace
}  // namespace trtllm::pointwise

extern "C" int trtllm_gated_supports(const trtllm_gated_params* p, int compute_capability) {
    using namespace trtllm;
    using namespace trtllm::pointwise;
    if (const auto code = check_gpu("gated", compute_capability)) return code;
    if (const auto code = check_types("gated", p->dtype, p->out_dtype)) return code;
    if (const auto code = check_sizes("gated", p->tokens, p->width)) return code;
    if (p->width > 65535 * 1024) {
        return refuse(cudaErrorInvalidValue, "gated takes a width up to 67107840, not %lld: split the rows",
                      static_cast<long long>(p->width));
    }
    if (p->activation < 0 || p->activation > 2) {
        return refuse(cudaErrorInvalidValue, "gated knows activations 0 (silu), 1 (gelu) and 2 (gelu_tanh), not %d",
                      p->activation);
    }
    return cudaSuccess;
}

extern "C" int trtllm_gated(const trtllm_gated_params* p, trtllm_stream stream) {
    using namespace trtllm;
    using namespace trtllm::pointwise;
    if (const int code = trtllm_gated_supports(p, compute_capability())) return code;
    if (const auto code = check_scales("gated", p->out_dtype, p->static_scale, p->token_scales)) return code;
    if (p->tokens == 0 || p->width == 0) return cudaSuccess;
    for (const auto& [name, pointer] : {std::pair<const char*, const void*>{"gate", p->gate}, {"up", p->up}, {"out", p->out}}) {
        if (const auto code = check_pointer("gated", name, pointer)) return code;
    }
    const auto on = static_cast<cudaStream_t>(stream);
    if (p->dtype == TRTLLM_FLOAT16) launch_gated<__half>(*p, on);
    if (p->dtype == TRTLLM_BFLOAT16) launch_gated<__nv_bfloat16>(*p, on);
    if (p->dtype == TRTLLM_FLOAT32) launch_gated<float>(*p, on);
    return launched("gated");
}
