#include "decode_layer_kernel.cuh"

namespace trtllm::decode_layer {
namespace {

template <typename T, Kind K>
const void* of_size(int32_t head_size) {
    return head_size == 64 ? reinterpret_cast<const void*>(&decode_layer_kernel<T, K, 128, 64>)
                           : reinterpret_cast<const void*>(&decode_layer_kernel<T, K, 128, 128>);
}

template <typename T>
const void* of_type(int32_t weight_dtype, int32_t head_size) {
    return weight_dtype == TRTLLM_INT8 ? of_size<T, Kind::kInt8>(head_size) : of_size<T, Kind::kFp8>(head_size);
}

}  // namespace

const void* eight_kernel(int32_t dtype, int32_t weight_dtype, int32_t head_size) {
    return dtype == TRTLLM_FLOAT16 ? of_type<__half>(weight_dtype, head_size)
                                   : of_type<__nv_bfloat16>(weight_dtype, head_size);
}

}  // namespace trtllm::decode_layer
