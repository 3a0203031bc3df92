#include "weight_only_gemv.cuh"
#include "weight_only_gemv_launch.hpp"

namespace trtllm::weight_only {

template <typename T, Kind K>
const void* of_form(Form form) {
    if (form == Form::kScaled) return reinterpret_cast<const void*>(&gemv_kernel<T, K, 128, true, false>);
    if (form == Form::kPlain) return reinterpret_cast<const void*>(&gemv_kernel<T, K, 128, false, false>);
    return reinterpret_cast<const void*>(&gemv_kernel<T, K, 128, false, true>);
}

template <typename T>
const void* of_weight(int32_t weight_dtype, Form form) {
    return weight_dtype == TRTLLM_INT8 ? of_form<T, Kind::kInt8>(form) : of_form<T, Kind::kFp8>(form);
}

const void* gemv_8bit_kernel(int32_t dtype, int32_t weight_dtype, Form form) {
    return dtype == TRTLLM_FLOAT16 ? of_weight<__half>(weight_dtype, form)
                                   : of_weight<__nv_bfloat16>(weight_dtype, form);
}

}  // namespace trtllm::weight_only
