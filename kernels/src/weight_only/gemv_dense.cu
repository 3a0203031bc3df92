#include "weight_only_gemv.cuh"
#include "weight_only_gemv_launch.hpp"

namespace trtllm::weight_only {

const void* gemv_dense_kernel(int32_t dtype) {
    if (dtype == TRTLLM_FLOAT16) return reinterpret_cast<const void*>(&gemv_kernel<__half, Kind::kDense, 128>);
    return reinterpret_cast<const void*>(&gemv_kernel<__nv_bfloat16, Kind::kDense, 128>);
}

}  // namespace trtllm::weight_only
