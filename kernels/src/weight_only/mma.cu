// Instances of the portable kernel.
#include "weight_only_mma.cuh"

namespace trtllm::weight_only {
namespace {

template <typename T>
cudaError_t launch(const TensorArguments& a, const void* x, int64_t x_stride, const void* weight, int64_t weight_row_bytes,
                   int stripes, int weight_dtype, cudaStream_t stream) {
    if (weight_dtype == TRTLLM_INT4) {
        return launch_portable<T, Weight::kInt4>(a, x, x_stride, weight, weight_row_bytes, stripes, stream);
    }
    if (weight_dtype == TRTLLM_INT8) {
        return launch_portable<T, Weight::kInt8>(a, x, x_stride, weight, weight_row_bytes, stripes, stream);
    }
    return launch_portable<T, Weight::kFp8>(a, x, x_stride, weight, weight_row_bytes, stripes, stream);
}

}  // namespace

cudaError_t portable(const TensorArguments& a, const void* x, int64_t x_stride, const void* weight, int64_t weight_row_bytes,
                     int stripes, int weight_dtype, bool half, cudaStream_t stream) {
    return half ? launch<__half>(a, x, x_stride, weight, weight_row_bytes, stripes, weight_dtype, stream)
                : launch<__nv_bfloat16>(a, x, x_stride, weight, weight_row_bytes, stripes, weight_dtype, stream);
}

}  // namespace trtllm::weight_only
