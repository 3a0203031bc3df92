// Host side that the launchers of this family share: launches with or without overlap, alignment, argument checks.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "registry.hpp"

namespace trtllm::pointwise {

/// `cluster` above 1 (compute capability 9.0): so many neighbours along x start together and share their memory.
/// `shared_bytes` is dynamic shared memory, for which the kernel has its attribute set.
template <typename Params>
void launch(void (*kernel)(Params), const Params& params, dim3 grid, dim3 block, cudaStream_t stream, bool pdl,
            unsigned cluster = 1, size_t shared_bytes = 0) {
    cudaLaunchConfig_t config = {};
    config.gridDim = grid;
    config.blockDim = block;
    config.stream = stream;
    config.dynamicSmemBytes = shared_bytes;
    cudaLaunchAttribute attributes[2] = {};
    config.attrs = attributes;
    if (pdl && compute_capability() >= 90) {
        attributes[config.numAttrs].id = cudaLaunchAttributeProgrammaticStreamSerialization;
        attributes[config.numAttrs++].val.programmaticStreamSerializationAllowed = 1;
    }
    if (cluster > 1) {
        attributes[config.numAttrs].id = cudaLaunchAttributeClusterDimension;
        attributes[config.numAttrs++].val.clusterDim = {cluster, 1, 1};
    }
    cudaLaunchKernelEx(&config, kernel, params);
}

/// Dynamic shared memory that a block can ask for on this GPU.
inline size_t most_shared_bytes() {
    int device = 0, bytes = 0;
    cudaGetDevice(&device);
    cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    return size_t(bytes);
}

/// Whether rows at `base`, `stride` elements of `size` bytes apart, all start at a multiple of `bytes`.
inline bool aligned(const void* base, int64_t stride, size_t size, size_t bytes) {
    return base == nullptr || (reinterpret_cast<uintptr_t>(base) % bytes == 0 && size_t(stride) * size % bytes == 0);
}

inline bool is_float(int32_t dtype) {
    return dtype == TRTLLM_FLOAT16 || dtype == TRTLLM_BFLOAT16 || dtype == TRTLLM_FLOAT32;
}
inline bool is_8bit(int32_t dtype) { return dtype == TRTLLM_INT8 || dtype == TRTLLM_FLOAT8_E4M3; }

cudaError_t check_gpu(const char* kernel, int compute_capability);
/// dtype a float, out_dtype the same or 8 bits.
cudaError_t check_types(const char* kernel, int32_t dtype, int32_t out_dtype);
/// An output of 8 bits has exactly one kind of scale, another has none. Only a launch has pointers.
cudaError_t check_scales(const char* kernel, int32_t out_dtype, const float* static_scale, const float* token_scales);
cudaError_t check_sizes(const char* kernel, int64_t tokens, int64_t width);
cudaError_t check_pointer(const char* kernel, const char* name, const void* pointer);

}  // namespace trtllm::pointwise
