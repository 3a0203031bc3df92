// Decoder layers for one token, by blocks that stay from the first layer to the last.
//
// A block is 16 warps on a multiprocessor of its own. Of each product it has every grid-th stripe of 16 rows; its warps
// share a stripe's inputs, so that a warp needs only its own share of the activations in shared memory, and meet once a
// product, when all stripes' sums are there. Rows go from block to block word by word (decode_layer_exchange.cuh); no
// step waits for more than what it reads. Weights, keys and values come through rings of buffers that know nothing of
// that: packed weights through one a block, which a warp more fills (decode_layer_stream.cuh), plain ones through one a
// warp (decode_layer_ring.cuh).
#pragma once

#include "decode_layer_attention.cuh"

namespace trtllm::decode_layer {

constexpr int kNormChunks = 2;  // of 8 inputs a lane: hidden up to 8192

static_assert(sizeof(Scratch) <= kScratchBytes);

template <typename T, Kind K, int Group, int D>
class Layers {
    static_assert(Attention<T, K, D>::kQueryBytes + Attention<T, K, D>::kWeightBytes == query_bytes(D));
    static_assert(Attention<T, K, D>::kSumBytes == attention_bytes(D));

    static constexpr int kChunks = K == Kind::kInt4 ? 16 : 8;  // of 8 inputs a tile
    using Part = std::conditional_t<K == Kind::kDense, Share, ChunkShare>;

    const trtllm_decode_layer_params& p;
    const Plan& plan;
    char* const shared;
    Scratch& scratch;
    const int lane, warp;
    Source<T, K, D> ring;
    Exchange exchange;
    float held = 0.0f;  // the stream's value at the output this thread finishes of o and of down

  public:
    __device__ __forceinline__ Layers(const trtllm_decode_layer_params& params, const Plan& plan_of, char* memory)
        : p(params),
          plan(plan_of),
          shared(memory),
          scratch(*reinterpret_cast<Scratch*>(memory)),
          lane(threadIdx.x % 32),
          warp(threadIdx.x / 32),
          ring(params, plan_of, scratch.keys, scratch.rows, memory, scratch.barriers),
          exchange(params.failed, &scratch.lost, __ldcg(&static_cast<const Counters*>(params.workspace)->tag)) {}

    __device__ __forceinline__ void run() {
        if (threadIdx.x == 0) scratch.lost = 0, scratch.keys = Keys(p, plan, tile_keys(D));
        load_row(0, row_word(0));
        const int n = (int(blockIdx.x) + int(threadIdx.x) / 16 * plan.grid) * 16 + int(threadIdx.x) % 16;
        if (n < p.hidden) held = float(static_cast<const T*>(p.x)[n]);
        __syncthreads();  // with the warp that fills the buffers
        if (warp >= kWarps) return ring.run();
        ring.may_read(0);
        const auto at = [&](int64_t offset) {
            return reinterpret_cast<uint64_t*>(static_cast<char*>(p.workspace) + offset);
        };
        for (int layer = 0; layer < p.layers; ++layer) {
            ++exchange.tag;
            const trtllm_decode_layer_row& row = scratch.rows[layer & 1];
            // one piece of code for all products: the instruction cache holds it from layer to layer
#pragma unroll 1
            for (int step = 0; step < kSteps; ++step) {
                if (step == kAttend) {
                    Attention<T, K, D>(p, plan, scratch.keys, ring, exchange, shared, scratch)
                        .run(row, at(plan.qkv_at), at(plan.attended_at));
                } else {
                    product(row, step, layer,
                            at(step == kQkv  ? plan.stream_at[0]
                               : step == kO  ? plan.attended_at
                               : step == kUp ? plan.stream_at[1]
                                             : plan.gated_at),
                            at(step == kQkv  ? plan.qkv_at
                               : step == kO  ? plan.stream_at[1]
                               : step == kUp ? plan.gated_at
                                             : plan.stream_at[0]));
                }
            }
        }
        leave(static_cast<Counters*>(p.workspace), exchange.tag, gridDim.x);
    }

  private:
    __device__ __forceinline__ uint32_t row_word(int layer) const {
        constexpr int kWords = sizeof(trtllm_decode_layer_row) / 4;
        static_assert(kWords <= kThreads);
        if (layer >= p.layers || int(threadIdx.x) >= kWords) return 0;
        return __ldg(reinterpret_cast<const uint32_t*>(p.table + layer) + threadIdx.x);
    }
    __device__ __forceinline__ void load_row(int layer, uint32_t word) {
        constexpr int kWords = sizeof(trtllm_decode_layer_row) / 4;
        if (layer < p.layers && int(threadIdx.x) < kWords) {
            reinterpret_cast<uint32_t*>(&scratch.rows[layer & 1])[threadIdx.x] = word;
        }
    }

    // This warp's share of x into shared memory as lanes read it (see stage_x of the products), normalised where
    // `normed`. x is words of two values; `plain` instead, values alone, where it is given.
    __device__ __forceinline__ void stage(const Part& share, int inputs, const uint64_t* x, const T* plain, bool normed,
                                          const uint4 (&by)[kNormChunks]) {
        const int count = share.count() * kChunks;
        const auto chunk = [&](int i) { return share.tile(i / kChunks) * kChunks + i % kChunks; };
        const auto inside = [&](int i) { return i < count && chunk(i) * 8 < inputs; };
        if (normed) {
            uint4 v[kNormChunks];
            exchange.until([&] {
                bool here = true;
#pragma unroll
                for (int n = 0; n < kNormChunks; ++n) {
                    v[n] = make_uint4(0, 0, 0, 0);
                    const int i = n * 32 + lane;
                    if (!inside(i)) continue;
                    if (plain != nullptr) {
                        v[n] = *reinterpret_cast<const uint4*>(plain + chunk(i) * 8);
                    } else {
                        here &= exchange.get_eight(x, chunk(i), v[n]);
                    }
                }
                return here;
            });
            __syncwarp();
            float squares = 0.0f;
#pragma unroll
            for (int n = 0; n < kNormChunks; ++n) squares += weight_only::square_sum<T>(v[n]);
            squares = weight_only::warp_sum(squares);
            if (lane == 0) scratch.partial[warp] = squares;
            meet();
            squares = 0.0f;
#pragma unroll
            for (int w = 0; w < kWarps; ++w) squares += scratch.partial[w];
            const float scale = rsqrtf(squares / float(inputs) + p.norm_eps);
            const auto norm = [&](uint32_t value, uint32_t weight) {
                const float2 a = weight_only::to_floats<T>(value), b = weight_only::to_floats<T>(weight);
                return weight_only::to_pair<T>(a.x * scale * (p.norm_offset + b.x),
                                               a.y * scale * (p.norm_offset + b.y));
            };
#pragma unroll
            for (int n = 0; n < kNormChunks; ++n) {
                if (n * 32 >= count) break;
                put({norm(v[n].x, by[n].x), norm(v[n].y, by[n].y), norm(v[n].z, by[n].z), norm(v[n].w, by[n].w)},
                    chunk(n * 32 + lane), n * 32 + lane < count);
            }
        } else {
            constexpr int kAtOnce = 4;
#pragma unroll 1
            for (int from = 0; from < count; from += 32 * kAtOnce) {
                uint4 v[kAtOnce];
                exchange.until([&] {
                    bool here = true;
#pragma unroll
                    for (int n = 0; n < kAtOnce; ++n) {
                        v[n] = make_uint4(0, 0, 0, 0);
                        const int i = from + n * 32 + lane;
                        if (inside(i)) here &= exchange.get_eight(x, chunk(i), v[n]);
                    }
                    return here;
                });
                __syncwarp();
#pragma unroll
                for (int n = 0; n < kAtOnce; ++n) {
                    if (from + n * 32 < count) put(v[n], chunk(from + n * 32 + lane), from + n * 32 + lane < count);
                }
            }
        }
        __syncwarp();
    }

    // A chunk of the row, where there is one; for int4 the sum of its group, too. Called by whole warps.
    __device__ __forceinline__ void put(const uint4& v, int chunk, bool exists) {
        if (exists) {
            char* const to = shared + plan.x_at + chunk / 4 * 64;
            if constexpr (K == Kind::kDense) {
                *reinterpret_cast<uint4*>(to + chunk % 4 * 16) = v;
            } else {
                uint32_t* const words = reinterpret_cast<uint32_t*>(to) + chunk % 4;
                words[0] = v.x, words[4] = v.y, words[8] = v.z, words[12] = v.w;
            }
        }
        if constexpr (K == Kind::kInt4) {
            using weight_only::to_floats;
            const float2 a = to_floats<T>(v.x), b = to_floats<T>(v.y), c = to_floats<T>(v.z), d = to_floats<T>(v.w);
            float sum = ((a.x + a.y) + (b.x + b.y)) + ((c.x + c.y) + (d.x + d.y));
#pragma unroll
            for (int step = 1; step < Group / 8; step *= 2) sum += __shfl_xor_sync(~0u, sum, step);
            if (exists && chunk % (Group / 8) == 0) {
                reinterpret_cast<float*>(shared + plan.sums_at)[chunk / (Group / 8) * 8] = sum;
            }
        }
    }

    // One product with all around it: out = round(act(sums * factor + bias) + residual).
    __device__ __forceinline__ void product(const trtllm_decode_layer_row& row, int step, int layer, const uint64_t* x,
                                            uint64_t* out) {
        ring.fill();  // what the step before gave back last: first of all it had its results to tell
        const int which = product_of(step), stripes = plan.stripes[which];
        if (int(blockIdx.x) >= stripes && step != kQkv) return;  // kQkv: all blocks load the next layer's row
        const bool normed = step == kQkv || step == kUp;
        const Part share(plan.tiles[which], warp);
        // what does not depend on the step before is read before the wait for it
        uint4 by[kNormChunks];
#pragma unroll
        for (int n = 0; n < kNormChunks; ++n) {
            const int i = n * 32 + lane, k = (share.tile(i / kChunks) * kChunks + i % kChunks) * 8;
            by[n] = make_uint4(0, 0, 0, 0);
            if (normed && i < share.count() * kChunks && k < plan.inputs[which]) {
                by[n] = *reinterpret_cast<const uint4*>(static_cast<const T*>(row.norm[step == kUp]) + k);
            }
        }
        // the output this thread finishes: of the block's stripe threadIdx.x / 16
        const int stripe = int(blockIdx.x) + int(threadIdx.x) / 16 * plan.grid, at = threadIdx.x % 16;
        const int n = stripe * 16 + at;
        const bool mine = stripe < stripes;
        float factor = row.multiplier[which], add = 0.0f;
        if constexpr (K == Kind::kInt8 || K == Kind::kFp8) {
            if (mine) factor *= __ldg(row.scale[which] + n);
            if constexpr (K == Kind::kFp8) factor *= weight_only::kFp8Scale<T>;
        }
        if (step == kQkv && row.qkv_bias != nullptr && mine) add = float(static_cast<const T*>(row.qkv_bias)[n]);
        const uint32_t word = step == kQkv ? row_word(layer + 1) : 0;

        if (step == kQkv) load_row(layer + 1, word);
        const T* const plain = step == kQkv && layer == 0 ? static_cast<const T*>(p.x) : nullptr;
        stage(share, plan.inputs[which], x, plain, normed, by);
        if (step == kQkv) ring.may_read(layer + 1);  // the norm has met all threads since the row was stored

        float* const reduce = reinterpret_cast<float*>(shared + plan.reduce_at[which]);
        float* sums = reduce + warp * 16 + lane / 4;
        const uint32_t tile_x = ptx::shared_address(shared + plan.x_at) + lane % 4 * 16;
        const uint32_t tile_sums = ptx::shared_address(shared + plan.sums_at) + lane % 4 * 8;
#pragma unroll 1
        for (int s = blockIdx.x; s < stripes; s += plan.grid, sums += kReducePitch) {
            // two tiles at a time: their products do not wait for each other
            float acc[4] = {}, other[4] = {};
            if constexpr (K == Kind::kDense) {
#pragma unroll 1
                for (int tile = share.first; tile < share.end; ++tile) {
                    ring.fill();
                    add_dense(acc, other, ring.wait(), tile_x + tile * 128);
                    ring.release();
                }
            } else {
                const auto add = [&](float(&to)[4], uint32_t from, int tile) {
                    if constexpr (K == Kind::kInt4) {
                        weight_only::add_int4_tile<T, Group>(to, from, tile_x + tile * 256,
                                                             tile_sums + tile * (128 / Group) * 32, lane, p.has_zero);
                    } else {
                        weight_only::add_8bit_tile<T, K>(to, from, tile_x + tile * 128, lane);
                    }
                };
#pragma unroll 1
                for (int c = 0; c < share.chunks(); ++c) {
                    const int tile = share.first(c), count = share.end(c) - tile;
                    const uint32_t from = ring.wait() + (tile - c * kChunkTiles) * plan.tile_bytes;
                    if (count == 2) {
                        add(acc, from, tile);
                        add(other, from + plan.tile_bytes, tile + 1);
                    } else if (count == 1) {
                        add(acc, from, tile);
                    }
                    ring.release();
                }
            }
            acc[0] += other[0], acc[2] += other[2];
            if (lane % 4 == 0) sums[0] = acc[0], sums[8] = acc[2];
        }
        meet();

        // whole warps: rows g and g + 8 of a gated stripe are one pair
        if (int(threadIdx.x & ~31u) / 16 * plan.grid + int(blockIdx.x) < stripes) {
            const float* const of = reduce + threadIdx.x / 16 * kReducePitch + at;
            float v = 0.0f;
            if (mine) {
#pragma unroll
                for (int w = 0; w < kWarps; ++w) v += of[w * 16];
            }
            v = fmaf(v, factor, add);
            int word_at = n / 2;
            bool writes = mine;
            if (step == kUp) {
                const float up = __shfl_down_sync(~0u, v, 8);
                v = weight_only::activate(v, 1) * up;
                word_at = (stripe * 8 + at) / 2;
                writes = mine && at < 8;
            } else if (step != kQkv) {
                v = float(T(v + held));
                held = v;
            }
            const float next = __shfl_down_sync(~0u, v, 1);
            const uint32_t pair = weight_only::to_pair<T>(v, next);
            if (writes && at % 2 == 0) {
                if (step == kDown && layer + 1 == p.layers) {
                    static_cast<uint32_t*>(p.out)[word_at] = pair;
                } else {
                    exchange.put(out + word_at, pair, step == kDown ? 1 : 0);
                }
            }
        }
    }

    // 16 rows x 64 inputs as the ring lays them (`ask_dense`), the first 32 added to `acc`, the others to `other`.
    __device__ __forceinline__ void add_dense(float (&acc)[4], float (&other)[4], uint32_t tile, uint32_t x) const {
        const int g = lane / 4, c = lane % 4;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const uint32_t at = tile + g * 128 + ((half * 4 + c) ^ 4 * (g % 2)) * 16;
            const uint4 low = weight_only::load_shared_16(at), high = weight_only::load_shared_16(at + 1024);
            const uint32_t a[8] = {low.x, high.x, low.y, high.y, low.z, high.z, low.w, high.w};
            weight_only::two_steps<T>(half ? other : acc, a, weight_only::load_shared_16(x + half * 64));
        }
    }
};

template <typename T, Kind K, int Group, int D>
__global__ void __launch_bounds__(kThreads + Source<T, K, D>::kThreadsOfItsOwn, 1)
    decode_layer_kernel(const __grid_constant__ trtllm_decode_layer_params p, const __grid_constant__ Plan plan) {
#if __CUDA_ARCH__ >= 900  // elsewhere the launcher refuses
    extern __shared__ __align__(128) char shared[];
    ptx::wait_for_previous_kernel();
    Layers<T, K, Group, D>(p, plan, shared).run();
#endif
}

}  // namespace trtllm::decode_layer
