// Attention of the context phase on Hopper: tensor copies, asynchronous products, warpgroups with roles.
//
// A persistent block walks over tiles of queries of one head. One thread of its first warpgroup copies query, key and value
// tiles into shared memory, two stages deep; two or three other warpgroups own 64 queries each. Such a warpgroup issues
// the next tile's scores and this tile's weighted sum of values together, and works out the next weights while the
// tensor cores run. Named barriers let one warpgroup's products run while another is at its exponentials.
// Source: Shah et al. 2024, "FlashAttention-3: Fast and Accurate Attention with Asynchrony and Low-precision".
#pragma once

#include <cuda.h>

#include "fmha_common.cuh"
#include "fmha_wgmma.cuh"

namespace trtllm::fmha {

template <int D>
struct HopperShape {
    static constexpr int kWidth = D <= 64 ? 64 : D <= 128 ? 128 : 256;  // a row in shared memory; past D it is zeros
    static constexpr int kChunks = kWidth / 64;                         // of 128 bytes, the widest swizzle
    static constexpr int kGroups = D <= 64 ? 3 : 2;                     // warpgroups that compute
    static constexpr int kRows = 64 * kGroups;
    static constexpr int kKeys = D <= 128 ? 128 : 64;
    static constexpr int kStages = 2;
    static constexpr int kThreads = 128 * (kGroups + 1);
    static constexpr int kQueryBytes = kRows * kWidth * 2;
    static constexpr int kStageBytes = kKeys * kWidth * 2;
    static constexpr bool kTurns = D <= 128;  // warpgroups take turns at the tensor cores
    static constexpr size_t kShared = 1024 + kQueryBytes + 2 * kStages * kStageBytes;
};

// The tiles of queries in the order blocks take them: a section of (sequence, head) pairs whose keys and values fit into
// the L2 cache together, in it the longest tiles (under a causal mask) of all pairs first.
struct Schedule {
    int tiles;     // in all
    int column;    // tiles of the longest sequence
    int pairs;     // batch * heads
    int section;   // pairs a section
    int* counter;  // zero at the start: the tiles taken beyond each block's first; null: a fixed order
};

struct HopperArguments {
    CUtensorMap q, k, v;
    trtllm_fmha_params p;
    Schedule schedule;
};

#if defined(TRTLLM_SM90A)

struct Tile {
    int row, head, batch;

    __device__ __forceinline__ Tile(const Schedule& s, int heads, int rows, int index) {
        const int whole = s.section * s.column;
        const int section = index / whole, rest = index - section * whole;
        const int size = min(s.section, s.pairs - section * s.section);
        const int column = rest / size;
        const int pair = section * s.section + rest - column * size;
        row = (s.column - 1 - column) * rows;
        batch = pair / heads;
        head = pair - batch * heads;
    }
};

// A stage of the ring and the parity its barriers are waited for with.
template <int Stages>
struct Ring {
    int stage = 0;
    uint32_t parity = 0;
    __device__ __forceinline__ void next() {
        if (++stage == Stages) {
            stage = 0;
            parity ^= 1;
        }
    }
};

template <int Stages>
struct Barriers {
    uint64_t q_full, q_empty;
    uint64_t k_full[Stages], k_empty[Stages];
    uint64_t v_full[Stages], v_empty[Stages];
    uint64_t tile_full, tile_empty;
    int tile;  // the index of the tile to compute next, the number of tiles when there is none
};

template <int D>
__device__ __forceinline__ void copy_keys(unsigned char* to, const CUtensorMap* map, uint64_t* barrier,
                                          const trtllm_fmha_params& p, const Sequence& s, int batch, int kv_head,
                                          int tile) {
    using Shape = HopperShape<D>;
    const int first = tile * Shape::kKeys;
    if (p.page_table == nullptr) {
        ptx::barrier_expect(barrier, Shape::kStageBytes);
#pragma unroll
        for (int c = 0; c < Shape::kChunks; ++c) {
            copy_box_4d(to + c * Shape::kKeys * 128, map, c * 64, s.kv_begin + first, kv_head, 0, barrier);
        }
        return;
    }
    // a box holds one page, or as much of it as the tile does; pages past the end are not looked at
    const int box = min(p.page_size, Shape::kKeys);
    const int boxes = (min(Shape::kKeys, s.kv_length - first) + box - 1) / box;
    ptx::barrier_expect(barrier, boxes * box * Shape::kWidth * 2);
    const int32_t* const pages = p.page_table + batch * p.page_table_stride;
#pragma unroll 1
    for (int i = 0; i < boxes; ++i) {
        const int j = first + i * box;
        const int page = __ldg(pages + j / p.page_size);
#pragma unroll
        for (int c = 0; c < Shape::kChunks; ++c) {
            copy_box_4d(to + (c * Shape::kKeys + i * box) * 128, map, c * 64, j % p.page_size, kv_head, page, barrier);
        }
    }
}

template <int D>
__device__ __forceinline__ void produce(const HopperArguments& a, unsigned char* q_tile, unsigned char* k_tile,
                                        unsigned char* v_tile, Barriers<HopperShape<D>::kStages>& barriers) {
    using Shape = HopperShape<D>;
    const trtllm_fmha_params& p = a.p;
    const int tiles = a.schedule.tiles;
    int keys = 0, values = 0;  // copies so far
    uint32_t q_parity = 0, tile_parity = 0;
    auto publish = [&](int index) {
        wait(&barriers.tile_empty, tile_parity ^ 1);
        tile_parity ^= 1;
        barriers.tile = index;
        ptx::barrier_arrive(&barriers.tile_full);
    };
    int index = blockIdx.x;
    while (index < tiles) {
        // asked for now, needed when this tile's copies are under way
        int following = index + int(gridDim.x);
        if (a.schedule.counter != nullptr) following = int(gridDim.x) + atomicAdd(a.schedule.counter, 1);
        const Tile at(a.schedule, p.heads, Shape::kRows, index);
        const Sequence s(p, at.batch);
        const int current = index;
        index = following;
        if (at.row >= s.q_length) continue;
        publish(current);
        const TileRange range(p, s, at.row, Shape::kRows, Shape::kKeys);
        if (range.first == range.end) continue;
        const int kv_head = at.head / (p.heads / p.kv_heads);

        // keys a tile ahead of values; one piece of code for both keeps this thread within its few registers
#pragma unroll 1
        for (int tile = range.end - 1; tile >= range.first - 1; --tile) {
#pragma unroll 1
            for (int of_values = 0; of_values < 2; ++of_values) {
                const int wanted = tile + of_values;
                if (wanted >= range.first && wanted < range.end) {
                    const int count = of_values ? values++ : keys++;
                    const int stage = count % Shape::kStages;
                    const uint32_t parity = count / Shape::kStages & 1;
                    uint64_t* const full = (of_values ? barriers.v_full : barriers.k_full) + stage;
                    wait((of_values ? barriers.v_empty : barriers.k_empty) + stage, parity ^ 1);
                    copy_keys<D>((of_values ? v_tile : k_tile) + stage * Shape::kStageBytes, of_values ? &a.v : &a.k, full,
                                 p, s, at.batch, kv_head, wanted);
                }
            }
            if (tile != range.end - 1) continue;
            wait(&barriers.q_empty, q_parity ^ 1);
            q_parity ^= 1;
            ptx::barrier_expect(&barriers.q_full, Shape::kQueryBytes);
#pragma unroll
            for (int c = 0; c < Shape::kChunks; ++c) {
                copy_box_3d(q_tile + c * Shape::kRows * 128, &a.q, c * 64, at.head, s.q_begin + at.row, &barriers.q_full);
            }
        }
    }
    publish(tiles);
}

// Values past a sequence's end are another's, or never written: they meet weights of 0, and 0 * NaN must not happen.
// Called by a whole warpgroup; all of them write the same zeros.
template <int D>
__device__ __forceinline__ void clear_rows(unsigned char* tile, int first, int group) {
    using Shape = HopperShape<D>;
    const int thread = threadIdx.x % 128;
    for (int i = thread; i < (Shape::kKeys - first) * 8; i += 128) {
#pragma unroll
        for (int c = 0; c < Shape::kChunks; ++c) {
            *reinterpret_cast<uint4*>(tile + (c * Shape::kKeys + first) * 128 + i * 16) = make_uint4(0, 0, 0, 0);
        }
    }
    ptx::fence_async_shared();
    ptx::named_barrier_sync<128>(8 + group);
}

// Rows of 64 x D sums into out: the four lanes that share a row trade pieces of 2 elements for pieces of 8.
template <typename T, int D>
__device__ __forceinline__ void store(float (&o)[D / 8][4], const float (&factor)[2], const trtllm_fmha_params& p,
                                      const Sequence& s, int row, int head) {
    const int lane = threadIdx.x % 32, quarter = lane % 4;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int at = row + 8 * half;
        T* const out =
            static_cast<T*>(p.out) + int64_t(s.q_begin + at) * p.out_token_stride + head * p.out_head_stride;
#pragma unroll
        for (int i = 0; i < D / 8; i += 4) {
            uint32_t x[4];
#pragma unroll
            for (int k = 0; k < 4; ++k) {
                const int column = i + k < D / 8 ? i + k : D / 8 - 1;
                x[k] = pack<T>(o[column][2 * half] * factor[half], o[column][2 * half + 1] * factor[half]);
            }
#pragma unroll
            for (int distance = 1; distance <= 2; distance *= 2) {
                const bool upper = quarter & distance;
#pragma unroll
                for (int k = 0; k < 4; ++k) {
                    if (k & distance) continue;
                    const uint32_t other = __shfl_xor_sync(0xffffffff, upper ? x[k] : x[k + distance], distance);
                    if (upper) x[k] = other;
                    if (!upper) x[k + distance] = other;
                }
            }
            if (at < s.q_length && i + quarter < D / 8) {
                *reinterpret_cast<uint4*>(out + 8 * (i + quarter)) = make_uint4(x[0], x[1], x[2], x[3]);
            }
        }
    }
}

// The warpgroup's 64 queries see no key at all.
template <typename T, int D>
__device__ __forceinline__ void store_nothing(const trtllm_fmha_params& p, const Sequence& s, int row, int head) {
    T* const out = static_cast<T*>(p.out) + int64_t(s.q_begin + row) * p.out_token_stride + head * p.out_head_stride;
    const int rows = min(64, s.q_length - row), thread = threadIdx.x % 128;
#pragma unroll 1
    for (int i = thread; i < rows * (D / 8); i += 128) {
        *reinterpret_cast<uint4*>(out + i / (D / 8) * p.out_token_stride + i % (D / 8) * 8) = make_uint4(0, 0, 0, 0);
    }
    if (p.lse != nullptr && thread < rows) p.lse[head * p.q_tokens + s.q_begin + row + thread] = -INFINITY;
}

template <typename T, int D, bool Extras>
__device__ __forceinline__ void consume(const HopperArguments& a, unsigned char* q_tile, unsigned char* k_tile,
                                        unsigned char* v_tile, Barriers<HopperShape<D>::kStages>& barriers, int group) {
    using Shape = HopperShape<D>;
    constexpr int kKeys = Shape::kKeys, kGroups = Shape::kGroups;
    const trtllm_fmha_params& p = a.p;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
    const bool leader = threadIdx.x % 128 == 0;
    Ring<Shape::kStages> keys, values;
    uint32_t q_parity = 0;
    const float c = Extras ? 1.0f : p.scale * kLog2e;
    const uint32_t q_address = ptx::shared_address(q_tile) + group * 64 * 128;
    const uint32_t k_address = ptx::shared_address(k_tile), v_address = ptx::shared_address(v_tile);
    if (Shape::kTurns && group == kGroups - 1) ptx::named_barrier_arrive<256>(1);

    float o[D / 8][4];
    float scores[kKeys / 8][4];
    uint32_t weights[kKeys / 16][4];

    for (uint32_t tile_parity = 0;; tile_parity ^= 1) {
        wait(&barriers.tile_full, tile_parity);
        const int index = barriers.tile;
        ptx::named_barrier_sync<128>(8 + group);
        if (leader) ptx::barrier_arrive(&barriers.tile_empty);
        if (index >= a.schedule.tiles) return;
        const Tile at(a.schedule, p.heads, Shape::kRows, index);
        const Sequence s(p, at.batch);
        const TileRange range(p, s, at.row, Shape::kRows, kKeys);
        if (range.first == range.end) {
            store_nothing<T, D>(p, s, at.row + group * 64, at.head);
            continue;
        }
        const int row = at.row + group * 64 + warp * 16 + lane / 4;
        const int position = row + s.shift;
        float inverse[2], lse[2];
        const float slope = Extras && p.alibi_slopes != nullptr ? p.alibi_slopes[at.head] : 0.0f;
        // tiles in [plain_first, plain_end) are seen whole by every query of the warpgroup
        const int group_position = at.row + group * 64 + s.shift;
        const int plain_end = (p.causal ? min(s.kv_length, group_position + 1) : s.kv_length) / kKeys;
        const int plain_first = p.window > 0 ? (max(0, group_position + 64 - p.window) + kKeys - 1) / kKeys : 0;
        Softmax softmax;

        auto multiply_keys = [&] {
            const uint32_t k_stage = k_address + keys.stage * Shape::kStageBytes;
            pin(scores);
            wgmma_fence();
#pragma unroll
            for (int i = 0; i < D / 16; ++i) {
                const uint32_t chunk = i / 4, inside = i % 4 * 32;
                SharedProduct<T, kKeys>::run(
                    scores, descriptor(q_address + chunk * Shape::kRows * 128 + inside, 16, 1024),
                    descriptor(k_stage + chunk * kKeys * 128 + inside, 16, 1024), i != 0);
            }
            wgmma_commit();
        };
        auto multiply_values = [&](bool add) {
            const uint32_t v_stage = v_address + values.stage * Shape::kStageBytes;
            pin(o);
            wgmma_fence();
#pragma unroll
            for (int j = 0; j < kKeys / 16; ++j) {
                RegisterProduct<T, D>::run(o, weights[j], descriptor(v_stage + j * 2048, kKeys * 128, 1024),
                                           add || j != 0);
            }
            wgmma_commit();
        };
        auto weigh = [&](int tile, float (&shrink)[2]) {
            const int column = tile * kKeys + 2 * (lane % 4);
            if (Extras) shape_scores(scores, p, slope, column, position);
            if (tile >= plain_end || tile < plain_first) {
                hide(scores, column, position, s.kv_length, p.causal, p.window);
            }
            softmax.step(scores, c, shrink);
        };
        auto round_weights = [&] {
#pragma unroll
            for (int j = 0; j < kKeys / 16; ++j) {
#pragma unroll
                for (int e = 0; e < 4; ++e) {
                    weights[j][e] =
                        pack<T>(scores[2 * j + e / 2][e % 2 * 2], scores[2 * j + e / 2][e % 2 * 2 + 1]);
                }
            }
        };
        auto await_values = [&](int tile) {
            wait(&barriers.v_full[values.stage], values.parity);
            if ((tile + 1) * kKeys > s.kv_length) {
                clear_rows<D>(v_tile + values.stage * Shape::kStageBytes, s.kv_length - tile * kKeys, group);
            }
        };
        auto release = [&](uint64_t* barrier) {
            if (leader) ptx::barrier_arrive(barrier);
        };

        wait(&barriers.q_full, q_parity);
        q_parity ^= 1;
        wait(&barriers.k_full[keys.stage], keys.parity);
        multiply_keys();
        wgmma_wait<0>();
        pin(scores);
        release(&barriers.k_empty[keys.stage]);
        keys.next();
        if (range.end - range.first == 1) release(&barriers.q_empty);
        float shrink[2];
        weigh(range.end - 1, shrink);
        round_weights();
        bool add = false;
        for (int tile = range.end - 2; tile >= range.first; --tile) {
            wait(&barriers.k_full[keys.stage], keys.parity);
            if (Shape::kTurns) ptx::named_barrier_sync<256>(1 + group);
            multiply_keys();
            await_values(tile + 1);
            multiply_values(add);
            add = true;
            if (Shape::kTurns) ptx::named_barrier_arrive<256>(1 + (group + 1) % kGroups);
            wgmma_wait<1>();
            pin(scores);
            release(&barriers.k_empty[keys.stage]);
            keys.next();
            if (tile == range.first) release(&barriers.q_empty);
            weigh(tile, shrink);
            wgmma_wait<0>();
            pin(o);
            release(&barriers.v_empty[values.stage]);
            values.next();
            round_weights();
#pragma unroll
            for (int i = 0; i < D / 8; ++i) {
#pragma unroll
                for (int e = 0; e < 4; ++e) o[i][e] *= shrink[e / 2];
            }
        }
        await_values(range.first);
        multiply_values(add);
        softmax.finish(c, inverse, lse);
        wgmma_wait<0>();
        pin(o);
        release(&barriers.v_empty[values.stage]);
        values.next();
        store<T, D>(o, inverse, p, s, row, at.head);
        if (p.lse != nullptr && lane % 4 == 0) {
            if (row < s.q_length) p.lse[at.head * p.q_tokens + s.q_begin + row] = lse[0];
            if (row + 8 < s.q_length) p.lse[at.head * p.q_tokens + s.q_begin + row + 8] = lse[1];
        }
    }
}

#endif  // TRTLLM_SM90A

template <typename T, int D, bool Extras>
__global__ void __launch_bounds__(HopperShape<D>::kThreads, 1) hopper_kernel(const __grid_constant__ HopperArguments a) {
#if defined(TRTLLM_SM90A)
    using Shape = HopperShape<D>;
    constexpr int kStages = Shape::kStages;
    extern __shared__ unsigned char shared[];
    __shared__ Barriers<kStages> barriers;
    // the swizzle counts in atoms of 1024 bytes
    unsigned char* const q_tile = shared + (1024 - ptx::shared_address(shared) % 1024) % 1024;
    unsigned char* const k_tile = q_tile + Shape::kQueryBytes;
    unsigned char* const v_tile = k_tile + kStages * Shape::kStageBytes;
    if (threadIdx.x == 0) {
        ptx::barrier_init(&barriers.q_full, 1);
        ptx::barrier_init(&barriers.q_empty, Shape::kGroups);
        ptx::barrier_init(&barriers.tile_full, 1);
        ptx::barrier_init(&barriers.tile_empty, Shape::kGroups);
        for (int i = 0; i < kStages; ++i) {
            ptx::barrier_init(&barriers.k_full[i], 1);
            ptx::barrier_init(&barriers.v_full[i], 1);
            ptx::barrier_init(&barriers.k_empty[i], Shape::kGroups);
            ptx::barrier_init(&barriers.v_empty[i], Shape::kGroups);
        }
        ptx::barrier_init_fence();
    }
    __syncthreads();
    if (a.p.pdl) ptx::wait_for_previous_kernel();
    const int group = int(threadIdx.x) / 128 - 1;
    if (group < 0) {
        give_registers<Shape::kGroups == 2 ? 40 : 32>();
        if (threadIdx.x == 0) produce<D>(a, q_tile, k_tile, v_tile, barriers);
    } else {
        take_registers<Shape::kGroups == 2 ? 232 : 160>();
        consume<T, D, Extras>(a, q_tile, k_tile, v_tile, barriers, group);
    }
#endif
}

}  // namespace trtllm::fmha
