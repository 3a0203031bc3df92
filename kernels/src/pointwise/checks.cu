// Argument checks that the launchers of this family share.
#include "launch.hpp"

namespace trtllm::pointwise {

cudaError_t check_gpu(const char* kernel, int compute_capability) {
    if (compute_capability >= 80) return cudaSuccess;
    return refuse(cudaErrorInvalidDeviceFunction, "%s needs compute capability 8.0, this GPU has %d.%d: use torch", kernel,
                  compute_capability / 10, compute_capability % 10);
}

cudaError_t check_types(const char* kernel, int32_t dtype, int32_t out_dtype) {
    if (!is_float(dtype)) {
        return refuse(cudaErrorInvalidValue, "%s takes float16, bfloat16 or float32, not %s", kernel,
                      name_of(trtllm_dtype(dtype)));
    }
    if (out_dtype != dtype && !is_8bit(out_dtype)) {
        return refuse(cudaErrorInvalidValue, "%s of %s gives %s, int8 or float8_e4m3, not %s", kernel,
                      name_of(trtllm_dtype(dtype)), name_of(trtllm_dtype(dtype)), name_of(trtllm_dtype(out_dtype)));
    }
    return cudaSuccess;
}

cudaError_t check_scales(const char* kernel, int32_t out_dtype, const float* static_scale, const float* token_scales) {
    const int given = (static_scale != nullptr) + (token_scales != nullptr);
    if (is_8bit(out_dtype) && given != 1) {
        return refuse(cudaErrorInvalidValue, "%s to %s needs either a static scale or room for a scale a token", kernel,
                      name_of(trtllm_dtype(out_dtype)));
    }
    if (!is_8bit(out_dtype) && given != 0) {
        return refuse(cudaErrorInvalidValue, "%s to %s has no scales: pass none, or ask for int8 or float8_e4m3", kernel,
                      name_of(trtllm_dtype(out_dtype)));
    }
    return cudaSuccess;
}

cudaError_t check_sizes(const char* kernel, int64_t tokens, int64_t width) {
    if (tokens >= 0 && width >= 0 && tokens < (int64_t(1) << 31) && width < (int64_t(1) << 31)) return cudaSuccess;
    return refuse(cudaErrorInvalidValue, "%s takes 0 to 2^31 - 1 tokens and elements a token, not %lld and %lld", kernel,
                  static_cast<long long>(tokens), static_cast<long long>(width));
}

cudaError_t check_pointer(const char* kernel, const char* name, const void* pointer) {
    if (pointer != nullptr) return cudaSuccess;
    return refuse(cudaErrorInvalidValue, "%s needs %s, which is a null pointer: pass a device pointer", kernel, name);
}

}  // namespace trtllm::pointwise
