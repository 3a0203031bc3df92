// How Hopper's attention kernels cut their work: shapes of tiles, the order in which blocks take them, and what the thread
// that copies shares with those that compute.
#pragma once

#include <cuda.h>

#include "fmha_common.cuh"
#include "fmha_wgmma.cuh"

namespace trtllm::fmha {

template <int D>
struct HopperShape {
    static constexpr int kWidth = D <= 64 ? 64 : D <= 128 ? 128 : 256;  // a row in shared memory; past D it is zeros
    static constexpr int kChunks = kWidth / 64;                         // of 128 bytes, the widest swizzle
    static constexpr int kGroups = 2;                                        // warpgroups that compute
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
    int fold;      // a tile has the rows of 1 << fold heads of one query (all read one kv head), then those of the next
    int heads;     // query heads >> fold
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
    int row, head, batch;  // its first

    __device__ __forceinline__ Tile(const Schedule& s, int rows, int index) {
        const int whole = s.section * s.column;
        const int section = index / whole, rest = index - section * whole;
        const int size = min(s.section, s.pairs - section * s.section);
        const int column = rest / size;
        const int pair = section * s.section + rest - column * size;
        row = (s.column - 1 - column) * rows;
        batch = pair / s.heads;
        head = (pair - batch * s.heads) << s.fold;
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

// Where a row of a tile of queries belongs.
struct Place {
    int query, head;  // query >= q_length: nowhere
    __device__ __forceinline__ Place(const Tile& t, int fold, int row)
        : query((t.row + row) >> fold), head(t.head + ((t.row + row) & ((1 << fold) - 1))) {}
    template <typename T>
    __device__ __forceinline__ T* out(const trtllm_fmha_params& p, const Sequence& s) const {
        return static_cast<T*>(p.out) + int64_t(s.q_begin + query) * p.out_token_stride + head * p.out_head_stride;
    }
    __device__ __forceinline__ void set_lse(const trtllm_fmha_params& p, const Sequence& s, float lse) const {
        if (query < s.q_length) p.lse[head * p.q_tokens + s.q_begin + query] = lse;
    }
};

#endif  // TRTLLM_SM90A

}  // namespace trtllm::fmha
