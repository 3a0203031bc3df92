// Tensor maps, and the choice of Hopper's attention kernel.
#include <cuda_runtime.h>

#include <cstring>

#include "fmha_hopper_launch.cuh"

namespace trtllm::fmha {
namespace {

using Encode = decltype(&cuTensorMapEncodeTiled);

// The driver's encoder, found at run time so that the library loads where there is no driver.
Encode encoder() {
    static const Encode found = [] {
        void* function = nullptr;
        cudaDriverEntryPointQueryResult result{};
#if CUDART_VERSION >= 12050
        const cudaError_t code = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000,
                                                                  cudaEnableDefault, &result);
#else
        const cudaError_t code =
            cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &function, cudaEnableDefault, &result);
#endif
        return code == cudaSuccess && result == cudaDriverEntryPointSuccess ? reinterpret_cast<Encode>(function)
                                                                            : nullptr;
    }();
    return found;
}

}  // namespace

cudaError_t encode(CUtensorMap* map, const void* base, trtllm_dtype type, int rank, const int64_t* sizes,
                   const int64_t* strides, const int* box) {
    const Encode function = encoder();
    if (function == nullptr) return cudaErrorNotSupported;
    cuuint64_t dimensions[4], bytes[3];
    cuuint32_t extents[4], steps[4];
    for (int i = 0; i < rank; ++i) {
        dimensions[i] = cuuint64_t(sizes[i]);
        extents[i] = cuuint32_t(box[i]);
        steps[i] = 1;
        // the stride of an axis with one element is never used, but must look like one
        if (i > 0) bytes[i - 1] = strides[i - 1] > 0 ? cuuint64_t(strides[i - 1]) * 2 : cuuint64_t(sizes[0]) * 2;
    }
    const CUresult code = function(
        map, type == TRTLLM_FLOAT16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
        cuuint32_t(rank), const_cast<void*>(base), dimensions, bytes, extents, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
        CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    return code == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

bool hopper_was_compiled() { return std::strstr(trtllm_build_info(), "\"90a\"") != nullptr; }

cudaError_t launch_hopper(const trtllm_fmha_params& p, cudaStream_t stream) {
    const bool half = p.dtype == TRTLLM_FLOAT16;
    switch (p.head_size) {
        case 64: return half ? launch_hopper_64_half(p, stream) : launch_hopper_64_bfloat16(p, stream);
        case 80: return half ? launch_hopper_80_half(p, stream) : launch_hopper_80_bfloat16(p, stream);
        case 96: return half ? launch_hopper_96_half(p, stream) : launch_hopper_96_bfloat16(p, stream);
        case 128: return half ? launch_hopper_128_half(p, stream) : launch_hopper_128_bfloat16(p, stream);
        default: return half ? launch_hopper_256_half(p, stream) : launch_hopper_256_bfloat16(p, stream);
    }
}

}  // namespace trtllm::fmha
