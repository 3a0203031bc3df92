#include "weight_only_gemv.cuh"
#include "weight_only_gemv_launch.hpp"

namespace trtllm::weight_only {

template <typename T>
const void* of_form(Form form) {
    if (form == Form::kCluster) return reinterpret_cast<const void*>(&gemv_kernel<T, Kind::kDense, 128, false, true>);
    return reinterpret_cast<const void*>(&gemv_kernel<T, Kind::kDense, 128, false, false>);
}

const void* gemv_dense_kernel(int32_t dtype, Form form) {
    return dtype == TRTLLM_FLOAT16 ? of_form<__half>(form) : of_form<__nv_bfloat16>(form);
}

}  // namespace trtllm::weight_only
