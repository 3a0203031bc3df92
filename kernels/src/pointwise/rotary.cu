// Between the fused projection and attention: per-head norm, rotary embedding and the write to the paged cache, in one.
#include "launch.hpp"
#include "trtllm_kernels/pointwise.h"
#include "vectors.cuh"

namespace trtllm::pointwise {
namespace {

const Capability capability(
    R"({"kernel": "rotary", "family": "pointwise", "min_compute_capability": 80, "dtypes": ["float16", "bfloat16"],
        "cache_dtypes": ["as qkv", "int8", "float8_e4m3"], "max_head_dim": 512,
        "options": ["half", "interleaved", "partial", "norm of q and k", "in place"]})");
const StructSize size("trtllm_rotary_params", sizeof(trtllm_rotary_params));

constexpr int kThreads = 128;

// `lanes` (a power of two, at most 32) threads a head, `Items` pairs of V-vectors each. Where the rotation pairs halves, a
// pair is vectors i and i + rotary_dim / 2 / V; everywhere else it is 2i and 2i + 1, so that both halves of every rotated
// pair of elements are in one thread.
template <typename T, int V, int Items>
__global__ void __launch_bounds__(kThreads) rotary_kernel(const __grid_constant__ trtllm_rotary_params p) {
    const int lanes = int(blockDim.x);
    const int head = blockIdx.y * int(blockDim.y) + int(threadIdx.y);
    const int heads = p.heads + 2 * p.kv_heads;
    const int64_t token = blockIdx.x;
    const int lane = int(threadIdx.x);
    const int pairs = p.head_dim / 2 / V, rotated = p.rotary_dim / 2 / V;
    const bool present = head < heads;
    const bool is_q = head < p.heads, is_v = head >= p.heads + p.kv_heads;
    const T* gamma = static_cast<const T*>(is_q ? p.q_norm : p.k_norm);
    const bool normed = present && !is_v && gamma != nullptr;

    int first[Items], second[Items];
#pragma unroll
    for (int n = 0; n < Items; ++n) {
        const int item = lane + n * lanes;
        const bool halves = !p.interleaved && item < rotated;
        first[n] = halves ? item * V : 2 * item * V;
        second[n] = halves ? (item + rotated) * V : (2 * item + 1) * V;
    }
    ptx::wait_for_previous_kernel();
    ptx::let_next_kernel_start();

    const T* row = static_cast<const T*>(p.qkv) + token * p.qkv_stride + int64_t(head) * p.head_dim;
    Pack<T, V> a[Items], b[Items];
#pragma unroll
    for (int n = 0; n < Items; ++n) {
        if (present && lane + n * lanes < pairs) {
            a[n] = load<T, V>(row + first[n]);
            b[n] = load<T, V>(row + second[n]);
        }
    }
    const int position = p.positions[token];
    const bool placed = position >= 0 && position < p.max_positions;
    float x[Items][V], y[Items][V];
    float sum = 0.0f;
#pragma unroll
    for (int n = 0; n < Items; ++n) {
        if (present && lane + n * lanes < pairs) {
            widen<T, V>(x[n], a[n]);
            widen<T, V>(y[n], b[n]);
#pragma unroll
            for (int i = 0; i < V; ++i) sum += x[n][i] * x[n][i] + y[n][i] * y[n][i];
        }
    }
    if (p.q_norm != nullptr || p.k_norm != nullptr) {  // the same for the whole block, so every lane takes part
        for (int step = lanes / 2; step > 0; step /= 2) sum += __shfl_xor_sync(~0u, sum, step);
        const float factor = rsqrtf(sum / float(p.head_dim) + p.eps);
#pragma unroll
        for (int n = 0; n < Items; ++n) {
            if (normed && lane + n * lanes < pairs) {
                float u[V], w[V];
                widen<T, V>(u, load<T, V>(gamma + first[n]));
                widen<T, V>(w, load<T, V>(gamma + second[n]));
#pragma unroll
                for (int i = 0; i < V; ++i) {
                    x[n][i] *= factor * (u[i] + p.norm_offset);
                    y[n][i] *= factor * (w[i] + p.norm_offset);
                }
            }
        }
    }
    if (!present) return;

    if (!is_v) {
        const int64_t at = int64_t(placed ? position : 0) * (p.rotary_dim / 2);
#pragma unroll
        for (int n = 0; n < Items; ++n) {
            const int item = lane + n * lanes;
            if (item >= rotated) continue;
            constexpr int W = V == 8 ? 4 : 1;  // floats in 16 bytes
            float c[V], s[V];
#pragma unroll
            for (int i = 0; i < V; i += W) {
                widen<float, W>(*reinterpret_cast<float(*)[W]>(&c[i]), load<float, W>(p.cos + at + item * V + i));
                widen<float, W>(*reinterpret_cast<float(*)[W]>(&s[i]), load<float, W>(p.sin + at + item * V + i));
            }
            const auto rotate = [](float& left, float& right, float cos, float sin) {
                const float kept = left;
                left = kept * cos - right * sin;
                right = right * cos + kept * sin;
            };
            if (!p.interleaved || V == 1) {
#pragma unroll
                for (int i = 0; i < V; ++i) rotate(x[n][i], y[n][i], c[i], s[i]);
            } else if constexpr (V > 1) {
#pragma unroll
                for (int i = 0; i < V / 2; ++i) {
                    rotate(x[n][2 * i], x[n][2 * i + 1], c[i], s[i]);
                    rotate(y[n][2 * i], y[n][2 * i + 1], c[V / 2 + i], s[V / 2 + i]);
                }
            }
        }
    }
    const int kv = head - p.heads - (is_v ? p.kv_heads : 0);
    T* out = nullptr;
    if (is_q) out = static_cast<T*>(p.q_out) + token * p.q_out_stride + int64_t(head) * p.head_dim;
    if (!is_q && !is_v && p.k_out != nullptr) {
        out = static_cast<T*>(p.k_out) + token * p.k_out_stride + int64_t(kv) * p.head_dim;
    }
    if (out != nullptr) {
#pragma unroll
        for (int n = 0; n < Items; ++n) {
            if (lane + n * lanes < pairs) {
                store<T, V>(out + first[n], x[n]);
                store<T, V>(out + second[n], y[n]);
            }
        }
    }
    if (is_q || p.k_pool == nullptr || !placed) return;

    const int sequence = p.sequences[token];
    const int slot = position / p.page_size;
    if (sequence < 0 || sequence >= p.batch || slot >= p.max_pages) return;
    const int page = p.page_table[sequence * p.page_table_stride + slot];
    if (page < 0 || page >= p.num_pages) return;
    const int64_t to = page * p.page_stride + (int64_t(kv) * p.page_size + position % p.page_size) * p.head_dim;
    void* pool = is_v ? p.v_pool : p.k_pool;
    const bool quantized = p.cache_dtype == TRTLLM_INT8 || p.cache_dtype == TRTLLM_FLOAT8_E4M3;
    const Divisor divided(quantized ? (is_v ? p.v_scale : p.k_scale)[kv] : 1.0f);
#pragma unroll
    for (int n = 0; n < Items; ++n) {
        if (lane + n * lanes >= pairs) continue;
        if (!quantized) {
            store<T, V>(static_cast<T*>(pool) + to + first[n], x[n]);
            store<T, V>(static_cast<T*>(pool) + to + second[n], y[n]);
        } else {
#pragma unroll
            for (int i = 0; i < V; ++i) {
                x[n][i] = divided(x[n][i]);
                y[n][i] = divided(y[n][i]);
            }
            const bool int8 = p.cache_dtype == TRTLLM_INT8;
            store_8bit(static_cast<uint8_t*>(pool) + to + first[n], x[n], int8, -127.0f);
            store_8bit(static_cast<uint8_t*>(pool) + to + second[n], y[n], int8, -127.0f);
        }
    }
}

template <typename T>
void launch_rotary(const trtllm_rotary_params& p, cudaStream_t stream) {
    constexpr int V = 8;
    const size_t cached = bytes_of(trtllm_dtype(p.cache_dtype));
    const bool fits = p.head_dim % (2 * V) == 0 && p.rotary_dim % (2 * V) == 0 && aligned(p.qkv, p.qkv_stride, 2, 16) &&
                      aligned(p.q_out, p.q_out_stride, 2, 16) && aligned(p.k_out, p.k_out_stride, 2, 16) &&
                      aligned(p.q_norm, 0, 2, 16) && aligned(p.k_norm, 0, 2, 16) && aligned(p.cos, 0, 4, 16) &&
                      aligned(p.sin, 0, 4, 16) && aligned(p.k_pool, p.page_stride, cached, V * cached) &&
                      aligned(p.v_pool, p.page_stride, cached, V * cached);
    const int pairs = fits ? p.head_dim / 2 / V : p.head_dim / 2;
    unsigned lanes = 1;
    while (lanes < 32 && int(lanes) < pairs) lanes *= 2;
    const dim3 block(lanes, kThreads / lanes);
    const unsigned heads = unsigned(p.heads + 2 * p.kv_heads);
    const dim3 grid(unsigned(p.tokens), (heads + block.y - 1) / block.y);
    launch(fits ? rotary_kernel<T, V, 1> : rotary_kernel<T, 1, 8>, p, grid, block, stream, p.pdl != 0);
}

}  // namespace
}  // namespace trtllm::pointwise

extern "C" int trtllm_rotary_supports(const trtllm_rotary_params* p, int compute_capability) {
    using namespace trtllm;
    using namespace trtllm::pointwise;
    if (const auto code = check_gpu("rotary", compute_capability)) return code;
    if (p->dtype != TRTLLM_FLOAT16 && p->dtype != TRTLLM_BFLOAT16) {
        return refuse(cudaErrorInvalidValue, "rotary takes float16 or bfloat16, not %s", name_of(trtllm_dtype(p->dtype)));
    }
    if (p->cache_dtype != p->dtype && !is_8bit(p->cache_dtype)) {
        return refuse(cudaErrorInvalidValue, "rotary of %s writes a cache of %s, int8 or float8_e4m3, not %s",
                      name_of(trtllm_dtype(p->dtype)), name_of(trtllm_dtype(p->dtype)),
                      name_of(trtllm_dtype(p->cache_dtype)));
    }
    if (p->head_dim < 2 || p->head_dim > 512 || p->head_dim % 2 != 0) {
        return refuse(cudaErrorInvalidValue, "rotary takes an even head size of 2 to 512, not %d", p->head_dim);
    }
    if (p->rotary_dim < 0 || p->rotary_dim > p->head_dim || p->rotary_dim % 2 != 0) {
        return refuse(cudaErrorInvalidValue, "rotary turns an even number of elements up to the head size %d, not %d",
                      p->head_dim, p->rotary_dim);
    }
    if (p->heads < 0 || p->kv_heads < 0 || p->heads > 65536 || p->kv_heads > 65536 || p->max_positions < 1) {
        return refuse(cudaErrorInvalidValue, "rotary takes 0 to 65536 heads and at least one position, not %d and %d heads "
                      "and %d positions", p->heads, p->kv_heads, p->max_positions);
    }
    return check_sizes("rotary", p->tokens, (p->heads + 2 * int64_t(p->kv_heads)) * p->head_dim);
}

extern "C" int trtllm_rotary(const trtllm_rotary_params* p, trtllm_stream stream) {
    using namespace trtllm;
    using namespace trtllm::pointwise;
    if (const int code = trtllm_rotary_supports(p, compute_capability())) return code;
    if (p->tokens == 0 || p->heads + p->kv_heads == 0) return cudaSuccess;
    const auto needs = [](const char* name, const void* pointer) { return check_pointer("rotary", name, pointer); };
    if (const auto code = needs("qkv", p->qkv)) return code;
    if (const auto code = needs("positions", p->positions)) return code;
    if (const auto code = p->heads == 0 ? cudaSuccess : needs("q_out", p->q_out)) return code;
    if (const auto code = p->rotary_dim == 0 ? cudaSuccess : needs("cos", p->cos)) return code;
    if (const auto code = p->rotary_dim == 0 ? cudaSuccess : needs("sin", p->sin)) return code;
    if (p->k_pool != nullptr) {
        if (const auto code = needs("v_pool", p->v_pool)) return code;
        if (const auto code = needs("sequences", p->sequences)) return code;
        if (const auto code = needs("page_table", p->page_table)) return code;
        if (const auto code = is_8bit(p->cache_dtype) ? needs("k_scale", p->k_scale) : cudaSuccess) return code;
        if (const auto code = is_8bit(p->cache_dtype) ? needs("v_scale", p->v_scale) : cudaSuccess) return code;
        if (p->page_size < 1) {
            return refuse(cudaErrorInvalidValue, "rotary needs pages of at least one position, not %d", p->page_size);
        }
    }
    const auto on = static_cast<cudaStream_t>(stream);
    if (p->dtype == TRTLLM_FLOAT16) launch_rotary<__half>(*p, on);
    if (p->dtype == TRTLLM_BFLOAT16) launch_rotary<__nv_bfloat16>(*p, on);
    return launched("rotary");
}
