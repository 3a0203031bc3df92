#include "decode_layer_kernel.cuh"

namespace trtllm::decode_layer {
namespace {

template <typename T, int Group>
const void* of_size(int32_t head_size) {
    return head_size == 64 ? reinterpret_cast<const void*>(&decode_layer_kernel<T, Kind::kInt4, Group, 64>)
                           : reinterpret_cast<const void*>(&decode_layer_kernel<T, Kind::kInt4, Group, 128>);
}

template <typename T>
const void* of_group(int32_t group, int32_t head_size) {
    if (group == 32) return of_size<T, 32>(head_size);
    return group == 64 ? of_size<T, 64>(head_size) : of_size<T, 128>(head_size);
}

}  // namespace

const void* int4_kernel(int32_t dtype, int32_t group, int32_t head_size) {
    return dtype == TRTLLM_FLOAT16 ? of_group<__half>(group, head_size) : of_group<__nv_bfloat16>(group, head_size);
}

}  // namespace trtllm::decode_layer
