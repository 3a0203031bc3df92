// Host side of the tensor-core kernels: the plans, and the functions that launch one instance each.
#pragma once

#include <cuda.h>
#include <cuda_runtime_api.h>

#include <cstdint>

namespace trtllm::weight_only {

struct TensorArguments;

/// How split_kernel's grid covers a product: clusters of `split` parts of K.
struct SplitPlan {
    int32_t split, token_tiles;
};

/// What a launch of one of the Hopper kernels needs.
struct HopperLaunch {
    const CUtensorMap* x_map;
    const CUtensorMap* weight_map;
    const TensorArguments* arguments;
    SplitPlan plan;
    int32_t tokens;  // of a tile: 16, 32, 64, 128 (split_kernel)
    int32_t groups;  // of 64 rows in a tile: 2, 4 (split_kernel)
    int32_t row_tiles;  // a multiple of 2 for persistent_kernel
    int32_t blocks;     // persistent_kernel
    bool half;  // float16, else bfloat16
    cudaStream_t stream;
};

cudaError_t split_int4(const HopperLaunch& launch);
cudaError_t split_int8(const HopperLaunch& launch);
cudaError_t split_fp8(const HopperLaunch& launch);
cudaError_t persistent_int4(const HopperLaunch& launch);
cudaError_t persistent_int8(const HopperLaunch& launch);
cudaError_t persistent_fp8(const HopperLaunch& launch);

// The kernel may have `bytes` of dynamic shared memory; `done_devices` remembers where that was set.
cudaError_t allow_shared(const void* kernel, int bytes, unsigned long long& done_devices);

// The portable kernel (mma.sync).
cudaError_t portable(const TensorArguments& arguments, const void* x, int64_t x_stride, const void* weight,
                     int64_t weight_row_bytes, int stripes, int weight_dtype, bool half, cudaStream_t stream);

}  // namespace trtllm::weight_only
