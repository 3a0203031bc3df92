#include "weight_only_gemv.cuh"
#include "weight_only_gemv_launch.hpp"

namespace trtllm::weight_only {

template <typename T>
const void* of_type(int32_t weight_dtype) {
    if (weight_dtype == TRTLLM_INT8) return reinterpret_cast<const void*>(&gemv_kernel<T, Kind::kInt8, 128>);
    return reinterpret_cast<const void*>(&gemv_kernel<T, Kind::kFp8, 128>);
}

const void* gemv_8bit_kernel(int32_t dtype, int32_t weight_dtype) {
    return dtype == TRTLLM_FLOAT16 ? of_type<__half>(weight_dtype) : of_type<__nv_bfloat16>(weight_dtype);
}

}  // namespace trtllm::weight_only
