// The warpgroups of a block that compute.
#pragma once

#include "fmha_hopper_work.cuh"

#if defined(TRTLLM_SM90A)

namespace trtllm::fmha {

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
__device__ __forceinline__ void store(float (&o)[D / 8][4], const float (&factor)[2], const HopperArguments& a,
                                      const Sequence& s, const Tile& t, int row) {
    const int lane = threadIdx.x % 32, quarter = lane % 4;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const Place at(t, a.schedule.fold, row + 8 * half);
        T* const out = at.out<T>(a.p, s);
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
            if (at.query < s.q_length && i + quarter < D / 8) {
                *reinterpret_cast<uint4*>(out + 8 * (i + quarter)) = make_uint4(x[0], x[1], x[2], x[3]);
            }
        }
    }
}

// The warpgroup's 64 queries see no key at all.
template <typename T, int D>
__device__ __forceinline__ void store_nothing(const HopperArguments& a, const Sequence& s, const Tile& t, int first) {
    const int thread = threadIdx.x % 128;
#pragma unroll 1
    for (int i = thread; i < 64 * (D / 8); i += 128) {
        const Place at(t, a.schedule.fold, first + i / (D / 8));
        if (at.query >= s.q_length) continue;
        *reinterpret_cast<uint4*>(at.out<T>(a.p, s) + i % (D / 8) * 8) = make_uint4(0, 0, 0, 0);
    }
    if (a.p.lse != nullptr && thread < 64) Place(t, a.schedule.fold, first + thread).set_lse(a.p, s, -INFINITY);
}

template <typename T, int D, bool Extras>
__device__ __forceinline__ void consume(const HopperArguments& a, unsigned char* q_tile, unsigned char* k_tile,
                                        unsigned char* v_tile, Barriers<HopperShape<D>::kStages>& barriers, int group) {
    using Shape = HopperShape<D>;
    constexpr int kKeys = Shape::kKeys, kGroups = Shape::kGroups;
    const trtllm_fmha_params& p = a.p;
    const int lane = threadIdx.x % 32;
    const int fold = a.schedule.fold, apart = 8 >> fold;
    const int own_row = group * 64 + threadIdx.x / 32 % 4 * 16 + lane / 4;  // in the tile of queries; and + 8
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
        ptx::barrier_arrive(&barriers.tile_empty);
        if (index >= a.schedule.tiles) return;
        const Tile at(a.schedule, Shape::kRows, index);
        const Sequence s(p, at.batch);
        const TileRange range(p, s, at.row >> fold, Shape::kRows >> fold, kKeys);
        if (range.first == range.end) {
            store_nothing<T, D>(a, s, at, group * 64);
            continue;
        }
        const int position = ((at.row + own_row) >> fold) + s.shift;
        float inverse[2], lse[2];
        const float slope = Extras && p.alibi_slopes != nullptr ? p.alibi_slopes[Place(at, fold, own_row).head] : 0.0f;
        // tiles in [plain_first, plain_end) are seen whole by every query of the warpgroup
        const int group_position = ((at.row + group * 64) >> fold) + s.shift;
        const int plain_end = (p.causal ? min(s.kv_length, group_position + 1) : s.kv_length) / kKeys;
        const int plain_first = p.window > 0 ? (max(0, group_position + (64 >> fold) - p.window) + kKeys - 1) / kKeys : 0;
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
            if (Extras) shape_scores(scores, p, slope, column, position, apart);
            if (tile >= plain_end || tile < plain_first) {
                hide(scores, column, position, apart, s.kv_length, p.causal, p.window);
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
        store<T, D>(o, inverse, a, s, at, own_row);
        if (p.lse != nullptr && lane % 4 == 0) {
            Place(at, fold, own_row).set_lse(p, s, lse[0]);
            Place(at, fold, own_row + 8).set_lse(p, s, lse[1]);
        }
    }
}

}  // namespace trtllm::fmha

#endif  // TRTLLM_SM90A
