#include "weight_only_gemv.cuh"
#include "weight_only_gemv_launch.hpp"

namespace trtllm::weight_only {

template <typename T>
const void* of_group(int32_t group) {
    if (group == 32) return reinterpret_cast<const void*>(&gemv_kernel<T, Kind::kInt4, 32>);
    if (group == 64) return reinterpret_cast<const void*>(&gemv_kernel<T, Kind::kInt4, 64>);
    return reinterpret_cast<const void*>(&gemv_kernel<T, Kind::kInt4, 128>);
}

const void* gemv_int4_kernel(int32_t dtype, int32_t group) {
    return dtype == TRTLLM_FLOAT16 ? of_group<__half>(group) : of_group<__nv_bfloat16>(group);
}

}  // namespace trtllm::weight_only
