// Between the launcher (checks, choice of a kernel) and the kernels, which are compiled one by one.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include "trtllm_kernels/w8a8.h"

namespace trtllm::w8a8 {

/// Tiles of 64 or 128 weight rows by `cols` activation rows, the K axis split over a cluster of `split` blocks.
struct Split {
    int rows, cols, split;
};

cudaError_t launch_split_int8(const trtllm_w8a8_params& p, Split how, cudaStream_t stream);
cudaError_t launch_split_fp8(const trtllm_w8a8_params& p, Split how, cudaStream_t stream);
cudaError_t launch_persistent_int8(const trtllm_w8a8_params& p, cudaStream_t stream);
cudaError_t launch_persistent_fp8(const trtllm_w8a8_params& p, cudaStream_t stream);
cudaError_t launch_persistent_fp8_fast(const trtllm_w8a8_params& p, cudaStream_t stream);
cudaError_t launch_portable_int8(const trtllm_w8a8_params& p, cudaStream_t stream);
cudaError_t launch_portable_fp8(const trtllm_w8a8_params& p, cudaStream_t stream);

/// A tensor map over `rows` rows of `columns` elements of 1 or 2 bytes, boxes of `box_columns` (128 bytes) by
/// `box_rows`, swizzled by 128 bytes; zeros outside.
cudaError_t tensor_map(CUtensorMap* map, const void* base, int element_bytes, int64_t rows, int64_t columns,
                       int64_t row_stride, int box_rows, int box_columns);

/// Raises the kernel's limit of dynamic shared memory, once for each device.
cudaError_t allow_shared(const void* kernel, int bytes, unsigned long long& done_devices);

}  // namespace trtllm::w8a8
