#include "decode_layer_kernel.cuh"

namespace trtllm::decode_layer {
namespace {

template <typename T>
const void* of_size(int32_t head_size) {
    return head_size == 64 ? reinterpret_cast<const void*>(&decode_layer_kernel<T, Kind::kDense, 128, 64>)
                           : reinterpret_cast<const void*>(&decode_layer_kernel<T, Kind::kDense, 128, 128>);
}

}  // namespace

const void* dense_kernel(int32_t dtype, int32_t head_size) {
    return dtype == TRTLLM_FLOAT16 ? of_size<__half>(head_size) : of_size<__nv_bfloat16>(head_size);
}

}  // namespace trtllm::decode_layer
