// The rows a block starts a job with: queries, and with `append` the newest key and value.
#pragma once

#include "mmha_kernel.cuh"

namespace trtllm::mmha {

template <typename C, int D, int NT>
struct Queries {
    using S = Shape<C, D, NT>;
    using Math = typename Cached<C>::Math;

    const trtllm_mmha_params& p;
    Math* const queries;         // [kRows][kQueryPitch]
    unsigned char* const k_new;  // [D] of C, and [D] of C behind it
    float* const factors;        // [kRows]
    const int group, rows;       // query heads a kv head; query rows a pair
    const int lane, warp;
    const bool bfloat16;

    __device__ __forceinline__ Queries(const trtllm_mmha_params& params, unsigned char* memory)
        : p(params),
          queries(reinterpret_cast<Math*>(memory)),
          k_new(memory + S::kQueryBytes),
          factors(reinterpret_cast<float*>(memory + S::kQueryBytes + 2 * S::kRowBytes)),
          group(params.heads / params.kv_heads),
          rows(params.heads / params.kv_heads * params.q_length),
          lane(threadIdx.x % 32),
          warp(threadIdx.x / 32),
          bfloat16(params.dtype == TRTLLM_BFLOAT16) {}

    // What a job's rows need beside themselves: read before they are there.
    struct Tables {
        Row<D> angles, q_weights, k_weights;
        const uint16_t* from;  // this warp's first row, or null
        C* cached;             // where the newest key (warp 0) or value (warp 1) belongs, or null
        Divisor scale;         // of it in the cache
    };
    // Whether the block has the pair's last key.
    __device__ __forceinline__ bool newest(const Job& job) const {
        return p.append && (job.first + job.count) * S::kUnit >= job.length;
    }
    __device__ __forceinline__ void load_tables(Tables& tables, const Job& job, int half) const {
        tables.from = row_of(job, warp - (newest(job) ? 2 : 0));
        tables.cached = nullptr;
        tables.scale = Divisor(1.0f);
        if (!p.append) return;
        if (warp < 2 && newest(job)) {
            // blocks with other query rows of this pair make the same values and leave the cache alone
            if (job.row == 0) tables.cached = newest_in_cache(job, warp == 1);
            if (Cached<C>::kBytes == 1) tables.scale = Divisor((warp == 1 ? p.v_scale : p.k_scale)[job.kv_head]);
        }
        if (p.rotary_dim > 0) {
            tables.angles.load_angles(p.positions != nullptr ? p.positions[job.sequence] : job.length - 1, p);
        }
        if (p.q_norm != nullptr) tables.q_weights.load(p.q_norm, half, bfloat16);
        if (p.k_norm != nullptr && warp == 0) tables.k_weights.load(p.k_norm, half, bfloat16);
    }

    // Row r of a job in the fused projection, or null: -2 and -1 are the newest key and value.
    __device__ __forceinline__ const uint16_t* row_of(const Job& job, int r) const {
        const uint16_t* const q = static_cast<const uint16_t*>(p.q) + job.sequence * p.q_batch_stride;
        if (r < 0) return q + (p.heads + (r == -1 ? p.kv_heads : 0) + job.kv_head) * D;
        if (r >= S::kRows || job.row + r >= rows) return nullptr;
        const int token = (job.row + r) / group, head = job.kv_head * group + (job.row + r) % group;
        return q + token * p.q_token_stride + head * p.q_head_stride;
    }

    // Query rows into shared memory, as the matrix unit takes them; with `append` also the newest key and value, by the
    // block that has the pair's last key.
    __device__ __forceinline__ void prepare(const Job& job, const Tables& tables, int half) {
        // all warps take their rows in turn, the two new ones first; a row's successor is on its way meanwhile
        int r = warp - (newest(job) ? 2 : 0);
        Row<D> row, next;
        const uint16_t* from = tables.from;
        if (from != nullptr) row.load(from, half, bfloat16);
        for (; r < S::kRows; r += S::kWarps) {
            const uint16_t* const after = row_of(job, r + S::kWarps);
            if (after != nullptr) next.load(after, half, bfloat16);
            if (r < 0) {
                const bool is_v = r == -1;
                if (!is_v) {
                    if (p.k_norm != nullptr) row.normalise(tables.k_weights, p);
                    row.rotate(tables.angles, p);
                }
                row.store_cached(tables.cached, reinterpret_cast<C*>(k_new + (is_v ? S::kRowBytes : 0)), half,
                                 tables.scale);
            } else if (from != nullptr) {
                if (p.append) {
                    if (p.q_norm != nullptr) row.normalise(tables.q_weights, p);
                    row.rotate(tables.angles, p);
                }
                const float factor =
                    row.store_query(queries + r * S::kQueryPitch, half, Cached<C>::kBytes == 1, bfloat16);
                if (lane == 0) factors[r] = factor;
            } else {
                for (int i = lane; i < D / 2; i += 32) {
                    reinterpret_cast<uint32_t*>(queries + r * S::kQueryPitch)[i] = 0;
                }
                if (lane == 0) factors[r] = 0.0f;
            }
            row = next;
            from = after;
        }
    }

    __device__ __forceinline__ C* newest_in_cache(const Job& job, bool is_v) const {
        const int key = job.length - 1, within = key % p.page_size;
        const int64_t page = p.page_table[job.sequence * p.page_table_stride + key / p.page_size];
        return is_v ? static_cast<C*>(p.v_cache) + page * p.v_page_stride + job.kv_head * p.v_head_stride +
                          within * p.v_token_stride
                    : static_cast<C*>(p.k_cache) + page * p.k_page_stride + job.kv_head * p.k_head_stride +
                          within * p.k_token_stride;
    }
};

}  // namespace trtllm::mmha
