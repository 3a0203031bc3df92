// Attention of one token within the decoder layers' kernel: a kv head's keys are shared by several blocks, a block's by
// its warps, a tile of 2 KB at a time. The block with the newest keys puts the head's parts together.
// Sources: Milakov and Gimelshein 2018 (online softmax); Dao et al. 2023 (flash-decoding).
#pragma once

#include "decode_layer_exchange.cuh"
#include "decode_layer_stream.cuh"

namespace trtllm::decode_layer {

constexpr float kLog2e = 1.4426950408889634f;

// What lies at the start of shared memory.
struct Scratch {
    uint64_t barriers[kWarps * kMostSlots];
    trtllm_decode_layer_row rows[2];
    float partial[kWarps];
    float2 statistics[kWarps][kMostGroup];
    Keys keys;
    int lost;
};

__device__ __forceinline__ float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// Where a block's weights, keys and values come from.
template <typename T, Kind K, int D>
using Source = std::conditional_t<K == Kind::kDense, Ring<T, K, D>, Stream<T, K, D>>;

// The threads that compute meet.
__device__ __forceinline__ void meet() { ptx::named_barrier_sync<kThreads>(1); }

template <typename T, Kind K, int D>
class Attention {
    static constexpr int kTileKeys = tile_keys(D);
    static constexpr int kRowBytes = D * 2;
    static constexpr int kEach = D / 32;  // of a head's elements, a lane
    static constexpr int kAtOnce = 4;     // heads whose sums the warps exchange at a time

    const trtllm_decode_layer_params& p;
    const Plan& plan;
    const Keys& keys;  // in shared memory
    Source<T, K, D>& ring;
    const Exchange& exchange;
    Scratch& scratch;
    char* const queries;       // [8 heads][kQueryPitch], then the new key and value
    float* const weights;      // [warp][kTileKeys][8 heads]
    float* const sums;         // [warp][kAtOnce][kSumPitch]
    const int lane, warp, group;

  public:
    static constexpr int kQueryPitch = kRowBytes + 64;
    static constexpr int kQueryBytes = kMostGroup * kQueryPitch + 2 * kRowBytes;
    static constexpr int kWeightBytes = kWarps * 16 * kMostGroup * 4;
    static constexpr int kSumPitch = D + 4;
    static constexpr int kSumBytes = kWarps * kAtOnce * kSumPitch * 4;

    __device__ __forceinline__ Attention(const trtllm_decode_layer_params& params, const Plan& plan_of,
                                         const Keys& keys_of, Source<T, K, D>& ring_of,
                                         const Exchange& exchange_of, char* shared, Scratch& of)
        : p(params),
          plan(plan_of),
          keys(keys_of),
          ring(ring_of),
          exchange(exchange_of),
          scratch(of),
          queries(shared + plan_of.query_at),
          weights(reinterpret_cast<float*>(shared + plan_of.query_at + kQueryBytes)),
          sums(reinterpret_cast<float*>(shared + plan_of.x_at)),
          lane(threadIdx.x % 32),
          warp(threadIdx.x / 32),
          group(params.heads / params.kv_heads) {}

    // From the fused projection's row to attended [heads * D], words of two values both.
    __device__ __forceinline__ void run(const trtllm_decode_layer_row& row, const uint64_t* qkv, uint64_t* attended) {
        if (keys.first >= keys.end) return;
        prepare(row, qkv);
        meet();
        float out[kMostGroup][kEach];
#pragma unroll
        for (int h = 0; h < kMostGroup; ++h) {
#pragma unroll
            for (int i = 0; i < kEach; ++i) out[h][i] = 0.0f;
        }
        float most[2] = {-INFINITY, -INFINITY}, all[2] = {0.0f, 0.0f};  // of heads 2 c and 2 c + 1
#pragma unroll 1
        for (int tile = keys.first + warp; tile < keys.end + warp; tile += kWarps) {
            if (tile >= keys.end) {
                ring.skip();
                ring.skip();
                break;
            }
            ring.fill();
            weigh(tile * kTileKeys, most, all, out);
            add(tile * kTileKeys, out);
        }
#pragma unroll
        for (int e = 0; e < 2; ++e) {
#pragma unroll
            for (int step = 4; step < 32; step *= 2) all[e] += __shfl_xor_sync(~0u, all[e], step);
            if (lane < 4) scratch.statistics[warp][2 * lane + e] = make_float2(most[e], all[e]);
        }
        leave(out, attended);
        meet();  // the sums lie where the next product has its inputs
    }

  private:
    // Warp r takes row r: the group's query heads, the key, the value. The block with the last key writes the cache.
    __device__ __forceinline__ void prepare(const trtllm_decode_layer_row& row, const uint64_t* qkv) {
        if (warp >= group + 2) return;
        const int heads = warp < group ? keys.head * group + warp
                                       : p.heads + (warp == group ? 0 : p.kv_heads) + keys.head;
        uint32_t* const to = reinterpret_cast<uint32_t*>(
            warp < group ? queries + warp * kQueryPitch
                         : queries + kMostGroup * kQueryPitch + (warp - group) * kRowBytes);
        uint32_t* cache = nullptr;
        if (warp >= group && keys.split == keys.splits - 1) {
            const int key = keys.length - 1;
            const int64_t page = __ldg(p.page_table + (key >> plan.page_shift));
            cache = reinterpret_cast<uint32_t*>(static_cast<T*>(warp == group ? row.k_cache : row.v_cache) +
                                                page * p.page_stride + keys.head * p.head_stride +
                                                (key & (p.page_size - 1)) * D);
        }
        // words i and D / 4 + i: pairs of elements that are rotated with each other
        if (lane >= D / 4) return;
        const int64_t position = min(keys.length, p.rotary_positions) - 1;
        float2 c = make_float2(1.0f, 1.0f), s = make_float2(0.0f, 0.0f);
        if (warp <= group) {
            c = __ldg(reinterpret_cast<const float2*>(p.cos + position * (D / 2)) + lane);
            s = __ldg(reinterpret_cast<const float2*>(p.sin + position * (D / 2)) + lane);
        }
        const uint64_t* const from = qkv + int64_t(heads) * (D / 2) + lane;
        uint32_t low, high;
        exchange.until([&] {
            const bool one = exchange.get(from, low);
            return exchange.get(from + D / 4, high) && one;
        });
        if (warp <= group) {
            float2 a = weight_only::to_floats<T>(low), b = weight_only::to_floats<T>(high);
            const auto turn = [](float& x, float& y, float cos, float sin) {
                // rounded as separate operations are, which is what the twin does
                const float kept = x;
                x = __fsub_rn(__fmul_rn(kept, cos), __fmul_rn(y, sin));
                y = __fadd_rn(__fmul_rn(y, cos), __fmul_rn(kept, sin));
            };
            turn(a.x, b.x, c.x, s.x);
            turn(a.y, b.y, c.y, s.y);
            low = weight_only::to_pair<T>(a.x, a.y), high = weight_only::to_pair<T>(b.x, b.y);
        }
        to[lane] = low, to[D / 4 + lane] = high;
        if (cache != nullptr) cache[lane] = low, cache[D / 4 + lane] = high;
    }

    // The newest key (or value) is not in the cache yet when the ring asks for it: into its place in the buffers.
    __device__ __forceinline__ void place(int first, bool value, uint32_t at) {
        const int behind = keys.length - 1 - first;
        if (behind >= kTileKeys) return;
        const uint32_t to = at + behind * kRowBytes;
        const uint32_t* const from =
            reinterpret_cast<const uint32_t*>(queries + kMostGroup * kQueryPitch + value * kRowBytes);
#pragma unroll
        for (int i = lane; i < D / 2; i += 32) {
            asm volatile("st.shared.u32 [%0], %1;" ::"r"(to + i * 4), "r"(from[i]) : "memory");
        }
        ptx::fence_async_shared();  // the copy engine may write there next
        __syncwarp();
    }

    // Scores of a tile's keys, their weights into shared memory; sums so far shrink where a maximum grew.
    __device__ __forceinline__ void weigh(int first, float (&most)[2], float (&all)[2],
                                          float (&out)[kMostGroup][kEach]) {
        const int g = lane / 4, c = lane % 4;
        const uint32_t at = ring.keys_of_warp(ring.wait());
        place(first, false, at);
        // rows g and g + 8 of the left operand; tiles of 8 keys have no row g + 8
        const uint32_t low = at + g * kRowBytes + c * 16;
        const uint32_t query = ptx::shared_address(queries) + min(g, group - 1) * kQueryPitch + c * 16;
        float s[4] = {};
#pragma unroll
        for (int j = 0; j < D / 32; ++j) {
            const uint4 x = weight_only::load_shared_16(low + j * 64);
            uint4 y = make_uint4(0, 0, 0, 0);
            if constexpr (kTileKeys == 16) y = weight_only::load_shared_16(low + 8 * kRowBytes + j * 64);
            const uint32_t a[8] = {x.x, y.x, x.y, y.y, x.z, y.z, x.w, y.w};
            weight_only::two_steps<T>(s, a, weight_only::load_shared_16(query + j * 64));
        }
        ring.release();
        float shrink[2];
        float2 w[2];
#pragma unroll
        for (int e = 0; e < 2; ++e) {
            const float near = first + g < keys.length ? s[e] * (p.scale * kLog2e) : -INFINITY;
            const float far = kTileKeys == 16 && first + g + 8 < keys.length ? s[e + 2] * (p.scale * kLog2e) : -INFINITY;
            float fresh = fmaxf(near, far);
#pragma unroll
            for (int step = 4; step < 32; step *= 2) fresh = fmaxf(fresh, __shfl_xor_sync(~0u, fresh, step));
            fresh = fmaxf(fresh, most[e]);
            shrink[e] = exp2_fast(most[e] - fresh);
            most[e] = fresh;
            const float one = exp2_fast(near - fresh), other = exp2_fast(far - fresh);
            all[e] = fmaf(all[e], shrink[e], one + other);
            (e == 0 ? w[0].x : w[0].y) = one;
            (e == 0 ? w[1].x : w[1].y) = other;
        }
        float* const mine = weights + warp * kTileKeys * kMostGroup;
        *reinterpret_cast<float2*>(mine + g * kMostGroup + 2 * c) = w[0];
        if constexpr (kTileKeys == 16) *reinterpret_cast<float2*>(mine + (g + 8) * kMostGroup + 2 * c) = w[1];
        __syncwarp();
#pragma unroll
        for (int h = 0; h < kMostGroup; ++h) {
            const float by = __shfl_sync(~0u, shrink[h % 2], h / 2);
#pragma unroll
            for (int i = 0; i < kEach; ++i) out[h][i] *= by;
        }
    }

    // out += weights * values; a lane has kEach elements of every head.
    __device__ __forceinline__ void add(int first, float (&out)[kMostGroup][kEach]) {
        const uint32_t at = ring.keys_of_warp(ring.wait());
        place(first, true, at);
        const uint32_t mine = ptx::shared_address(weights + warp * kTileKeys * kMostGroup);
        const int count = min(kTileKeys, keys.length - first);
#pragma unroll 4
        for (int j = 0; j < count; ++j) {
            float v[kEach];
            const uint32_t from = at + j * kRowBytes + lane * (kEach * 2);
            if constexpr (kEach == 4) {
                const uint2 pairs = weight_only::load_shared_8(from);
                const float2 a = weight_only::to_floats<T>(pairs.x), b = weight_only::to_floats<T>(pairs.y);
                v[0] = a.x, v[1] = a.y, v[2] = b.x, v[3] = b.y;
            } else {
                const float2 a = weight_only::to_floats<T>(weight_only::load_shared_4(from));
                v[0] = a.x, v[1] = a.y;
            }
            const uint32_t weight = mine + j * kMostGroup * 4;
            accumulate(out, 0, weight_only::load_shared_16(weight), v);
            if (group > 4) accumulate(out, 4, weight_only::load_shared_16(weight + 16), v);
        }
        ring.release();
    }
    __device__ __forceinline__ static void accumulate(float (&out)[kMostGroup][kEach], int from, const uint4& four,
                                                      const float (&v)[kEach]) {
        const float w[4] = {__uint_as_float(four.x), __uint_as_float(four.y), __uint_as_float(four.z),
                            __uint_as_float(four.w)};
#pragma unroll
        for (int h = 0; h < 4; ++h) {
#pragma unroll
            for (int i = 0; i < kEach; ++i) out[from + h][i] = fmaf(w[h], v[i], out[from + h][i]);
        }
    }

    // Words of a block's part: a head's sums [D], its maximum, its sum of weights.
    __device__ __forceinline__ uint64_t* part(int split, int head) const {
        char* const memory = static_cast<char*>(p.workspace);
        return reinterpret_cast<uint64_t*>(memory + plan.parts_at) +
               ((int64_t(keys.head) * kMostSplits + split) * kMostGroup + head) * (D + 2);
    }

    // The warps' sums put together: this block's part, or the result by the block with the newest keys.
    __device__ __forceinline__ void leave(float (&out)[kMostGroup][kEach], uint64_t* attended) {
        const int warps = min(kWarps, keys.end - keys.first);
        const bool newest = keys.split == keys.splits - 1;
#pragma unroll 1
        for (int from = 0; from < group; from += kAtOnce) {
            if (from > 0) {
                meet();
#pragma unroll
                for (int h = 0; h < kAtOnce; ++h) {
#pragma unroll
                    for (int i = 0; i < kEach; ++i) out[h][i] = out[kAtOnce + h][i];
                }
            }
#pragma unroll
            for (int h = 0; h < kAtOnce; ++h) {
                float* const to = sums + (warp * kAtOnce + h) * kSumPitch + lane * kEach;
                if constexpr (kEach == 4) {
                    *reinterpret_cast<float4*>(to) =
                        make_float4(out[h][0], out[h][1], out[h][2], out[h][3]);
                } else {
                    *reinterpret_cast<float2*>(to) = make_float2(out[h][0], out[h][1]);
                }
            }
            meet();
            // whole warps: D is a multiple of 32
            const int here = min(kAtOnce, group - from), i = threadIdx.x;
            static_assert(kAtOnce * D <= kThreads);
            if (i >= here * D) continue;
            const int h = i / D, d = i % D;
            float most = -INFINITY, total = 0.0f, all = 0.0f;
            for (int w = 0; w < warps; ++w) most = fmaxf(most, scratch.statistics[w][from + h].x);
            for (int w = 0; w < warps; ++w) {
                const float2 one = scratch.statistics[w][from + h];
                const float by = exp2_fast(one.x - most);
                all = fmaf(one.y, by, all);
                total = fmaf(sums[(w * kAtOnce + h) * kSumPitch + d], by, total);
            }
            if (!newest) {
                uint64_t* const to = part(keys.split, from + h);
                exchange.put(to + d, __float_as_uint(total));
                if (d < 2) exchange.put(to + D + d, __float_as_uint(d == 0 ? most : all));
                continue;
            }
            add_parts(from + h, d, most, all, total);
            const float value = total / all, next = __shfl_down_sync(~0u, value, 1);
            if (d % 2 == 0) {
                exchange.put(attended + (int64_t(keys.head * group + from + h) * D + d) / 2,
                             weight_only::to_pair<T>(value, next));
            }
        }
    }

    // The other blocks' parts of one element, some of them on their way at a time.
    __device__ __forceinline__ void add_parts(int head, int d, float& most, float& all, float& total) const {
        constexpr int kParts = 3;
#pragma unroll 1
        for (int from = 0; from < keys.splits - 1; from += kParts) {
            uint32_t x[kParts], m[kParts], s[kParts];
            exchange.until([&] {
                bool here = true;
#pragma unroll
                for (int n = 0; n < kParts; ++n) {
                    x[n] = s[n] = 0, m[n] = __float_as_uint(-INFINITY);
                    if (from + n < keys.splits - 1) {
                        const uint64_t* const words = part(from + n, head);
                        here &= exchange.get(words + d, x[n]);
                        here &= exchange.get_two(words + D, m[n], s[n]);
                    }
                }
                return here;
            });
            float fresh = most;
#pragma unroll
            for (int n = 0; n < kParts; ++n) fresh = fmaxf(fresh, __uint_as_float(m[n]));
            const float shrink = exp2_fast(most - fresh);
            most = fresh, all *= shrink, total *= shrink;
#pragma unroll
            for (int n = 0; n < kParts; ++n) {
                const float by = exp2_fast(__uint_as_float(m[n]) - most);
                all = fmaf(__uint_as_float(s[n]), by, all);
                total = fmaf(__uint_as_float(x[n]), by, total);
            }
        }
    }
};

}  // namespace trtllm::decode_layer
