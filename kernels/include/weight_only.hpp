// Host side of the weight-only family: sizes of the packed layout, and the functions the dispatcher chooses between.
// THE FORMAT IS FINAL (described in trtllm_kernels/weight_only.h).
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "trtllm_kernels/weight_only.h"

namespace trtllm::weight_only {

constexpr int kStripeRows = 16;
constexpr int kTileWeightBytes = 1024;  // then, in int4, the tile's scales and zeros
constexpr int kRowPadding = 64;
constexpr int64_t kGemvTokens = 8;  // up to here the kernels for few tokens serve

// Inputs in one tile of the packed layout.
constexpr int tile_depth(int32_t weight_dtype) { return weight_dtype == TRTLLM_INT4 ? 128 : 64; }
constexpr int64_t stripes(int64_t n) { return (n + kRowPadding - 1) / kRowPadding * (kRowPadding / kStripeRows); }
constexpr int64_t tiles_along_k(int64_t k, int32_t weight_dtype) {
    return (k + tile_depth(weight_dtype) - 1) / tile_depth(weight_dtype);
}
// Bytes of one tile with its scales and zeros.
constexpr int tile_bytes(int32_t weight_dtype, int group, bool has_zero) {
    return weight_dtype == TRTLLM_INT4 ? kTileWeightBytes + 128 / group * (has_zero ? 48 : 32) : kTileWeightBytes;
}
constexpr bool packed(const trtllm_weight_only_gemm_params& p) { return p.weight_dtype != p.dtype; }

// Columns of the output: a gated product has one for two rows.
constexpr int64_t outputs(const trtllm_weight_only_gemm_params& p) { return p.gate ? p.n / 2 : p.n; }

// ---- few tokens: src/weight_only/gemv*.cu -------------------------------------------------------------------------
// `supports` looks at no pointer beyond null or not, and leaves a sentence by refuse(). M <= kGemvTokens.
cudaError_t gemv_supports(const trtllm_weight_only_gemm_params& p, int compute_capability);
int64_t gemv_workspace_bytes(const trtllm_weight_only_gemm_params& p);
cudaError_t gemv(const trtllm_weight_only_gemm_params& p, cudaStream_t stream);

// ---- many tokens: src/weight_only/mma*.cu, wgmma*.cu --------------------------------------------------------------
// Called with M > kGemvTokens, or tactic >= 100 at any M; packed weights only; arguments common to both (null pointers,
// strides >= widths, alignment of x, weight, scale, out to 16 bytes and of x_stride to 8 elements) are checked already.
// Must take: bias, residual (may alias out), gate (rows g and g + 8 of a stripe are one pair), has_zero, any N and K,
// groups 32/64/128. Never sees `order` or `norm_weight`: the dispatcher gathers or normalises x into the workspace
// before, and passes x, x_stride and the rest of the workspace (workspace, workspace_bytes) on.
cudaError_t tensor_cores_supports(const trtllm_weight_only_gemm_params& p, int compute_capability);
int64_t tensor_cores_workspace_bytes(const trtllm_weight_only_gemm_params& p);
cudaError_t tensor_cores(const trtllm_weight_only_gemm_params& p, cudaStream_t stream);

}  // namespace trtllm::weight_only
