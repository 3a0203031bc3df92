// Host side of Hopper's attention kernels: tensor maps, schedule, grid.
#pragma once

#include <algorithm>

#include "fmha_hopper.cuh"
#include "fmha_launch.hpp"
#include "registry.hpp"

namespace trtllm::fmha {

/// A map over elements of 2 bytes with up to four axes; `strides` of axes 1 ... in elements. Boxes are swizzled in rows of 128 bytes.
cudaError_t encode(CUtensorMap* map, const void* base, trtllm_dtype type, int rank, const int64_t* sizes,
                   const int64_t* strides, const int* box);

/// Base-2 logarithm of how many heads that share keys shall lie in one tile: as many as make fewer tiles, at most 8 (the two rows
/// of a thread, 8 apart, are then of one head).
template <int Rows>
int heads_packed(const trtllm_fmha_params& p) {
    const auto tiles = [&](int fold) {
        return ((int64_t(p.max_q_length) << fold) + Rows - 1) / Rows * (p.heads >> fold);
    };
    int best = 0;
    for (int fold = 1; fold <= 3 && p.heads / p.kv_heads % (1 << fold) == 0 && Rows % (1 << fold) == 0; ++fold) {
        if (tiles(fold) < tiles(best)) best = fold;
    }
    return best;
}

template <typename T, int D>
cudaError_t launch_hopper(const trtllm_fmha_params& p, cudaStream_t stream) {
    using Shape = HopperShape<D>;
    HopperArguments a{};
    a.p = p;
    const auto type = trtllm_dtype(p.dtype);
    const int64_t q_sizes[] = {D, p.heads, p.q_tokens}, q_strides[] = {p.q_head_stride, p.q_token_stride};
    const int fold = heads_packed<Shape::kRows>(p);
    const int q_box[] = {64, 1 << fold, Shape::kRows >> fold};
    cudaError_t code = encode(&a.q, p.q, type, 3, q_sizes, q_strides, q_box);
    const bool paged = p.page_size != 0;
    // a map must describe something, even where no sequence has keys and nothing will be copied
    const bool nothing = (paged ? p.num_pages : p.kv_tokens) == 0;
    const int64_t rows = paged ? p.page_size : std::max<int64_t>(1, p.kv_tokens);
    const int64_t kv_sizes[] = {D, rows, p.kv_heads, paged ? std::max<int64_t>(1, p.num_pages) : 1};
    const int kv_box[] = {64, paged ? std::min(p.page_size, Shape::kKeys) : Shape::kKeys, 1, 1};
    const int64_t k_strides[] = {p.k_token_stride, p.k_head_stride, p.k_page_stride};
    const int64_t v_strides[] = {p.v_token_stride, p.v_head_stride, p.v_page_stride};
    if (code == cudaSuccess) code = encode(&a.k, nothing ? p.q : p.k, type, 4, kv_sizes, k_strides, kv_box);
    if (code == cudaSuccess) code = encode(&a.v, nothing ? p.q : p.v, type, 4, kv_sizes, v_strides, kv_box);
    if (code != cudaSuccess) return code;

    a.schedule.fold = fold;
    a.schedule.heads = p.heads >> fold;
    const int64_t pairs = int64_t(p.batch) * a.schedule.heads;
    a.schedule.column = int(((int64_t(p.max_q_length) << fold) + Shape::kRows - 1) / Shape::kRows);
    a.schedule.pairs = int(pairs);
    a.schedule.tiles = int(pairs * a.schedule.column);
    // keys and values of a section take two thirds of the 50 MB of L2, shared by a group; sections of one size, because
    // a small last one would leave blocks idle
    const int64_t keys = paged ? p.max_q_length : p.kv_tokens / p.batch;
    const int64_t pair_bytes = std::max<int64_t>(1, keys * D * 4 / (a.schedule.heads / p.kv_heads));
    const int64_t most = std::clamp<int64_t>((int64_t(32) << 20) / pair_bytes, 1, pairs);
    const int64_t sections = (pairs + most - 1) / most;
    a.schedule.section = int((pairs + sections - 1) / sections);
    const int blocks = std::min(a.schedule.tiles, multiprocessors());
    if (p.workspace != nullptr && a.schedule.tiles > blocks) {
        a.schedule.counter = static_cast<int*>(p.workspace);
        code = cudaMemsetAsync(p.workspace, 0, sizeof(int), stream);
        if (code != cudaSuccess) return code;
    }
    const bool extras = p.soft_cap > 0.0f || p.alibi_slopes != nullptr;
    const dim3 grid{unsigned(blocks)};
    return extras ? start(hopper_kernel<T, D, true>, grid, Shape::kThreads, Shape::kShared, p.pdl != 0, stream, a)
                  : start(hopper_kernel<T, D, false>, grid, Shape::kThreads, Shape::kShared, p.pdl != 0, stream, a);
}

}  // namespace trtllm::fmha
