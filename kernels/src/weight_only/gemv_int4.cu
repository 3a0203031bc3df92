#include "weight_only_gemv.cuh"
#include "weight_only_gemv_launch.hpp"

namespace trtllm::weight_only {

template <typename T, int Group>
const void* of_form(Form form) {
    // groups of 32 leave no registers for it
    if constexpr (Group > 32) {
        if (form == Form::kScaled) {
            return reinterpret_cast<const void*>(&gemv_kernel<T, Kind::kInt4, Group, true, false>);
        }
    }
    if (form != Form::kCluster) return reinterpret_cast<const void*>(&gemv_kernel<T, Kind::kInt4, Group, false, false>);
    return reinterpret_cast<const void*>(&gemv_kernel<T, Kind::kInt4, Group, false, true>);
}

template <typename T>
const void* of_group(int32_t group, Form form) {
    return group == 32 ? of_form<T, 32>(form) : group == 64 ? of_form<T, 64>(form) : of_form<T, 128>(form);
}

const void* gemv_int4_kernel(int32_t dtype, int32_t group, Form form) {
    return dtype == TRTLLM_FLOAT16 ? of_group<__half>(group, form) : of_group<__nv_bfloat16>(group, form);
}

}  // namespace trtllm::weight_only
