// Generation attention for every GPU since Ampere.
//
// The queries that share a kv head (a group's heads, times the new tokens) are the columns of every product, eight or
// sixteen of them:  scores^T = K q^T  and  out^T = V^T weights^T,  so that keys and values fill the long side of the
// matrix unit's operand and padding a small group costs little. Each warp owns every kWarps-th run of 16 keys: it
// copies them into its own buffers (several in flight), keeps its own softmax, and meets the others only when its block
// leaves a pair. Then the block writes the result or, where several blocks share the pair, its part of it; the last of
// them to come adds the parts in the order of the keys.
// Sources: Milakov and Gimelshein 2018 (online softmax); Dao et al. 2023 (flash-decoding).
//
// Tried on an H200 for one sequence and slower: eight warps a block, two runs of keys at a time, filling a buffer after
// its use instead of the one before it, prefetching what buffers do not hold into L2, starting the next kernel later.
#pragma once

#include "mmha_convert.cuh"
#include "mmha_rows.cuh"
#include "mmha_work.cuh"

namespace trtllm::mmha {

constexpr int kKeys = 16;  // a warp's step
constexpr int kMaxStages = 6;
constexpr int kMaxBlocks = 4096;
constexpr int kPartsAtOnce = 16;  // of a pair, that whoever puts it together has on their way
constexpr int kOwedBytes = 48;  // of shared memory, for what a block puts together in the end
constexpr float kLog2e = 1.4426950408889634f;

template <typename C, int D, int NT>
struct Shape {
    static constexpr int kRowBytes = D * Cached<C>::kBytes;
    static constexpr int kChunks = kRowBytes / 16;
    static constexpr int kWarps = kRowBytes > 256 ? 2 : 4;
    static constexpr int kThreads = 32 * kWarps;
    // blocks an SM that registers must allow
    static constexpr int kResident = D >= 128 || NT > 1 ? 2 : 3;
    static constexpr int kUnit = kKeys * kWarps;
    static constexpr int kRows = 8 * NT;
    static constexpr int kTileBytes = kKeys * kRowBytes;      // of keys, or of values
    static constexpr int kStageBytes = 2 * kTileBytes * kWarps;
    static constexpr int kQueryPitch = D + 8;  // elements; fragments are then read without bank conflicts
    static constexpr int kQueryBytes = kRows * kQueryPitch * 2;
    static constexpr int kFixedBytes = (kQueryBytes + 2 * kRowBytes + kRows * 4 + kOwedBytes + 511) / 512 * 512;
    static constexpr int kSumPitch = D + 4;
    static constexpr int kMergeBytes = kWarps * kRows * (kSumPitch + 2) * 4;
    static constexpr int kPartFloats = kRows * (D + 2);

    // rows are then aligned to their own size, and an exclusive or on the address moves chunks within a row
    static constexpr bool kAligned = (kChunks & (kChunks - 1)) == 0;

    // 16-byte chunks of a row change places so that eight rows' chunks of one column lie in eight different bank groups
    static constexpr int kSpread = kChunks % 8 == 0 ? 8 : kChunks % 4 == 0 ? 4 : kChunks % 2 == 0 ? 2 : 1;
    static __device__ __forceinline__ int swizzle(int row) { return row / (8 / kSpread) % kSpread; }
};

// What a block works on: units [first, first + count) of a pair.
struct Job {
    int sequence, kv_head, row;  // `row`: the first query row, of q_length * group
    int first, count;
    int length, low;
};

template <typename C, int D, int NT>
struct Warp {
    using S = Shape<C, D, NT>;
    using Math = typename Cached<C>::Math;

    const trtllm_mmha_params& p;
    unsigned char* const tiles;  // this warp's buffers: [stages][keys, values]
    const uint32_t tiles_at;
    const bool dense;  // the keys of a page and head lie one behind the other, and so do the values
    const int lane, warp;
    const char* k_base;
    const char* v_base;
    const int32_t* pages;
    int page_shift;
    int load_low, load_end;  // keys [load_low, load_end) are in the cache

    float max[NT][2], sum[NT][2];
    float out[D / 16][NT][4];

    __device__ __forceinline__ Warp(const trtllm_mmha_params& params, unsigned char* shared, int stages)
        : p(params),
          tiles(shared + threadIdx.x / 32 * stages * 2 * S::kTileBytes),
          tiles_at(ptx::shared_address(tiles)),
          dense(params.k_token_stride == D && params.v_token_stride == D),
          lane(threadIdx.x % 32),
          warp(threadIdx.x / 32) {
        page_shift = 31 - __clz(p.page_size);
    }

    __device__ __forceinline__ void start(const Job& job) {
        k_base = static_cast<const char*>(p.k_cache) + job.kv_head * p.k_head_stride * Cached<C>::kBytes;
        v_base = static_cast<const char*>(p.v_cache) + job.kv_head * p.v_head_stride * Cached<C>::kBytes;
        pages = p.page_table + job.sequence * p.page_table_stride;
        load_low = job.low;
        load_end = job.length - (p.append ? 1 : 0);
#pragma unroll
        for (int n = 0; n < NT; ++n) {
#pragma unroll
            for (int e = 0; e < 2; ++e) max[n][e] = -INFINITY, sum[n][e] = 0.0f;
#pragma unroll
            for (int j = 0; j < D / 16; ++j) {
#pragma unroll
                for (int e = 0; e < 4; ++e) out[j][n][e] = 0.0f;
            }
        }
    }

    __device__ __forceinline__ int key_of(int unit) const { return unit * S::kUnit + warp * kKeys; }
    __device__ __forceinline__ int page_of(int unit) const {
        const int key = key_of(unit);
        return key < load_end ? __ldg(pages + (key >> page_shift)) : 0;
    }

    // 16 keys and values on their way to buffer `stage`; rows outside the cache's part of the sequence become zeros
    __device__ __forceinline__ void load(int unit, int page, int stage) const {
        const int key = key_of(unit), within = key & (p.page_size - 1);
        const char* k = k_base + (page * p.k_page_stride + within * p.k_token_stride) * Cached<C>::kBytes;
        const char* v = v_base + (page * p.v_page_stride + within * p.v_token_stride) * Cached<C>::kBytes;
        const uint32_t to = tiles_at + stage * 2 * S::kTileBytes;
        constexpr int kCopies = kKeys * S::kChunks;
        if constexpr (S::kAligned) {
            if (dense && key >= load_low && key + kKeys <= load_end) {
                // A copy of the warp takes 32 chunks in a row, 32 / kChunks whole rows of both sides: the next one goes
                // to the same chunks but for the swizzle, whose bits do not overlap with those of the lane's own row.
                constexpr int kRowsACopy = 32 / S::kChunks;
                const int row = lane / S::kChunks, chunk = lane % S::kChunks;
                const uint32_t to_lane = to + row * S::kRowBytes + (chunk ^ S::swizzle(row)) * 16;
#pragma unroll
                for (int i = 0; i < kCopies / 32; ++i) {
                    const uint32_t at = (to_lane ^ (S::swizzle(i * kRowsACopy) * 16)) + i * 512;
                    copy_async(at, k + lane * 16 + i * 512);
                    copy_async(at + S::kTileBytes, v + lane * 16 + i * 512);
                }
                return;
            }
        }
        const int k_step = int(p.k_token_stride) * Cached<C>::kBytes;
        const int v_step = int(p.v_token_stride) * Cached<C>::kBytes;
#pragma unroll
        for (int i = 0; i < (kCopies + 31) / 32; ++i) {
            const int index = i * 32 + lane;
            if (kCopies % 32 != 0 && index >= kCopies) break;
            const int row = index / S::kChunks, chunk = index % S::kChunks;
            const bool inside = key + row >= load_low && key + row < load_end;
            const uint32_t at = to + row * S::kRowBytes + (chunk ^ S::swizzle(row)) * 16;
            copy_async(at, k + row * k_step + chunk * 16, inside ? 16 : 0);
            copy_async(at + S::kTileBytes, v + row * v_step + chunk * 16, inside ? 16 : 0);
        }
    }

    // the newest key and value, which no copy brings, into row `row` of a buffer
    __device__ __forceinline__ void place(int row, const unsigned char* k_new, const unsigned char* v_new,
                                          int stage) const {
        unsigned char* const to = tiles + stage * 2 * S::kTileBytes + row * S::kRowBytes;
        for (int i = lane; i < 2 * S::kChunks; i += 32) {
            const int which = i / S::kChunks, chunk = i % S::kChunks;
            *reinterpret_cast<uint4*>(to + which * S::kTileBytes + (chunk ^ S::swizzle(row)) * 16) =
                *reinterpret_cast<const uint4*>((which ? v_new : k_new) + chunk * 16);
        }
    }

    // The query fragments of mma number j (16 elements of the head), for columns n.
    __device__ __forceinline__ void query(const Math* queries, int n, int j, uint32_t& b0, uint32_t& b1) const {
        const Math* const row = queries + (n * 8 + lane / 4) * S::kQueryPitch + j * 16;
        if constexpr (Cached<C>::kBytes == 2) {
            b0 = *reinterpret_cast<const uint32_t*>(row + lane % 4 * 2);
            b1 = *reinterpret_cast<const uint32_t*>(row + lane % 4 * 2 + 8);
        } else {
            // a lane gets bytes 4t .. 4t + 3 of a row of keys and splits them into even and odd ones: the order of the
            // elements in a dot product is free, and the query follows
            const uint2 four = *reinterpret_cast<const uint2*>(row + lane % 4 * 4);
            b0 = __byte_perm(four.x, four.y, 0x5410);
            b1 = __byte_perm(four.x, four.y, 0x7632);
        }
    }

    // Chunk 2 i + half of a row.
    static __device__ __forceinline__ uint32_t chunk_of(uint32_t row_at, int row, int half, int i) {
        if constexpr (S::kAligned) return (row_at + (half ^ S::swizzle(row)) * 16) ^ (i * 32);
        // the last chunk of an odd number has no partner: both halves of the warp read it
        if constexpr (S::kChunks % 2 != 0) return row_at + min(2 * i + half, S::kChunks - 1) * 16;
        return row_at + (2 * i ^ half ^ S::swizzle(row)) * 16;
    }

    // scores^T [16 keys, 8 NT queries] of the keys in buffer `stage`
    template <typename Query>
    __device__ __forceinline__ void score(float (&s)[NT][4], int stage, Query query_fragment) const {
        const int row = lane % 16;
        const uint32_t k_row = tiles_at + stage * 2 * S::kTileBytes + row * S::kRowBytes;
        float other[NT][4];
#pragma unroll
        for (int n = 0; n < NT; ++n) {
#pragma unroll
            for (int e = 0; e < 4; ++e) s[n][e] = other[n][e] = 0.0f;
        }
#pragma unroll
        for (int i = 0; i < (S::kChunks + 1) / 2; ++i) {
            uint32_t r[4];
            ldmatrix(r, chunk_of(k_row, row, lane / 16, i));
            if constexpr (Cached<C>::kBytes == 2) {
#pragma unroll
                for (int n = 0; n < NT; ++n) {
                    uint32_t b0, b1;
                    query_fragment(n, i, b0, b1);
                    ptx::mma_16816<Math>(i % 2 ? other[n] : s[n], r, b0, b1);
                }
            } else {
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    if (2 * i + half >= S::kChunks) break;
                    uint32_t a[4];
                    Cached<C>::expand(r[2 * half], a[0], a[2]);
                    Cached<C>::expand(r[2 * half + 1], a[1], a[3]);
#pragma unroll
                    for (int n = 0; n < NT; ++n) {
                        uint32_t b0, b1;
                        query_fragment(n, 2 * i + half, b0, b1);
                        ptx::mma_16816<Math>(half ? other[n] : s[n], a, b0, b1);
                    }
                }
            }
        }
#pragma unroll
        for (int n = 0; n < NT; ++n) {
#pragma unroll
            for (int e = 0; e < 4; ++e) s[n][e] += other[n][e];
        }
    }

    // Scores, already exponents of 2, become weights; sums so far shrink where a maximum grew. b: operands of `add`.
    __device__ __forceinline__ void weigh(float (&s)[NT][4], uint32_t (&b)[NT][2]) {
        float fresh[NT][2];
        bool grew = false;
#pragma unroll
        for (int n = 0; n < NT; ++n) {
#pragma unroll
            for (int e = 0; e < 2; ++e) {
                float most = fmaxf(s[n][e], s[n][e + 2]);
#pragma unroll
                for (int step = 4; step < 32; step *= 2) most = fmaxf(most, __shfl_xor_sync(~0u, most, step));
                fresh[n][e] = fmaxf(max[n][e], most);
                grew |= fresh[n][e] > max[n][e];
            }
        }
        if (__any_sync(~0u, grew)) {
#pragma unroll
            for (int n = 0; n < NT; ++n) {
#pragma unroll
                for (int e = 0; e < 2; ++e) {
                    // minus infinity less minus infinity never gets here as a difference that counts: sums are 0 then
                    const float shrink = fresh[n][e] == max[n][e] ? 1.0f : exp2_approx(max[n][e] - fresh[n][e]);
                    max[n][e] = fresh[n][e];
                    sum[n][e] *= shrink;
#pragma unroll
                    for (int j = 0; j < D / 16; ++j) {
                        out[j][n][e] *= shrink;
                        out[j][n][e + 2] *= shrink;
                    }
                }
            }
        }
#pragma unroll
        for (int n = 0; n < NT; ++n) {
            float w[4];
#pragma unroll
            for (int e = 0; e < 2; ++e) {
                const float base = max[n][e] == -INFINITY ? 0.0f : max[n][e];  // no query sees a key yet: weights of 0
                w[e] = exp2_approx(s[n][e] - base);
                w[e + 2] = exp2_approx(s[n][e + 2] - base);
                sum[n][e] += w[e] + w[e + 2];
            }
            b[n][0] = transpose_8x8(pack<Math>(w[0], w[1]));
            b[n][1] = transpose_8x8(pack<Math>(w[2], w[3]));
        }
    }

    // out^T += V^T weights^T
    __device__ __forceinline__ void add(const uint32_t (&b)[NT][2], int stage) {
        // 16 bits: matrices (keys 0-7, d 0-7), (0-7, 8-15), (8-15, 0-7), (8-15, 8-15). 8 bits: (keys 0-7, chunk 0),
        // (8-15, 0), (0-7, 1), (8-15, 1)
        const int row = Cached<C>::kBytes == 2 ? lane % 8 + lane / 16 * 8 : lane % 16;
        const int half = Cached<C>::kBytes == 2 ? lane / 8 % 2 : lane / 16;
        const uint32_t v_row = tiles_at + (stage * 2 + 1) * S::kTileBytes + row * S::kRowBytes;
#pragma unroll
        for (int i = 0; i < (S::kChunks + 1) / 2; ++i) {
            uint32_t r[4];
            ldmatrix_trans(r, chunk_of(v_row, row, half, i));
            if constexpr (Cached<C>::kBytes == 2) {
#pragma unroll
                for (int n = 0; n < NT; ++n) ptx::mma_16816<Math>(out[i][n], r, b[n][0], b[n][1]);
            } else {
#pragma unroll
                for (int side_of = 0; side_of < 2; ++side_of) {
                    if (2 * i + side_of >= S::kChunks) break;
                    // transposing pairs of bytes leaves (d, d + 1) of two keys: even bytes are row d, odd ones row d +
                    // 1
                    uint32_t a[4];
                    Cached<C>::expand(r[2 * side_of], a[0], a[1]);
                    Cached<C>::expand(r[2 * side_of + 1], a[2], a[3]);
#pragma unroll
                    for (int n = 0; n < NT; ++n) ptx::mma_16816<Math>(out[2 * i + side_of][n], a, b[n][0], b[n][1]);
                }
            }
        }
    }

    // This warp's sums where all can read them: sums [kRows][kSumPitch], statistics [kRows] of (maximum, sum).
    __device__ __forceinline__ void leave(float* sums, float2* statistics) const {
        sums += warp * S::kRows * S::kSumPitch;
        statistics += warp * S::kRows;
#pragma unroll
        for (int n = 0; n < NT; ++n) {
#pragma unroll
            for (int e = 0; e < 2; ++e) {
                float all = sum[n][e];
#pragma unroll
                for (int step = 4; step < 32; step *= 2) all += __shfl_xor_sync(~0u, all, step);
                const int row = n * 8 + lane % 4 * 2 + e;
                if (lane < 4) statistics[row] = make_float2(max[n][e], all);
                float* const to = sums + row * S::kSumPitch;
#pragma unroll
                for (int j = 0; j < D / 16; ++j) {
                    if constexpr (Cached<C>::kBytes == 2) {
                        to[j * 16 + lane / 4] = out[j][n][e];
                        to[j * 16 + lane / 4 + 8] = out[j][n][e + 2];
                    } else {
                        *reinterpret_cast<float2*>(to + j * 16 + lane / 4 * 2) =
                            make_float2(out[j][n][e], out[j][n][e + 2]);
                    }
                }
            }
        }
    }
};

}  // namespace trtllm::mmha
