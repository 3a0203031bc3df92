// The one thread of a block that issues its copies.
#pragma once

#include "fmha_hopper_work.cuh"

#if defined(TRTLLM_SM90A)

namespace trtllm::fmha {

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
    const int tiles = a.schedule.tiles, fold = a.schedule.fold;
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
        const Tile at(a.schedule, Shape::kRows, index);
        const Sequence s(p, at.batch);
        const int current = index;
        index = following;
        const int query = at.row >> fold;
        if (query >= s.q_length) continue;
        publish(current);
        const TileRange range(p, s, query, Shape::kRows >> fold, Shape::kKeys);
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
                copy_box_3d(q_tile + c * Shape::kRows * 128, &a.q, c * 64, at.head, s.q_begin + query, &barriers.q_full);
            }
        }
    }
    publish(tiles);
}

}  // namespace trtllm::fmha

#endif  // TRTLLM_SM90A
