// Between the launcher of generation attention (checks) and the kernels, which are compiled one cache type a file.
#pragma once

#include <cuda_runtime_api.h>

#include "trtllm_kernels/mmha.h"

namespace trtllm::mmha {

constexpr int kMaxGrid = 4096;
constexpr int kMostBlocksAnSm = 4;   // of a grid that the launcher chooses

// Checked parameters in; the error of setting up the launch out.
cudaError_t launch_half(const trtllm_mmha_params& p, cudaStream_t stream);
cudaError_t launch_bfloat16(const trtllm_mmha_params& p, cudaStream_t stream);
cudaError_t launch_int8(const trtllm_mmha_params& p, cudaStream_t stream);
cudaError_t launch_fp8(const trtllm_mmha_params& p, cudaStream_t stream);

/// Query rows a block takes at a time: 8, or 16 where the group (times the new tokens) has more.
inline int rows_of(const trtllm_mmha_params& p) { return p.heads / p.kv_heads * p.q_length <= 8 ? 8 : 16; }

}  // namespace trtllm::mmha
