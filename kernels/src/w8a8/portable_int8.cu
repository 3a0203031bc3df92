#include "w8a8_portable.cuh"

namespace trtllm::w8a8 {

cudaError_t launch_portable_int8(const trtllm_w8a8_params& p, cudaStream_t stream) {
    return launch_portable_type<int32_t>(p, stream);
}

}  // namespace trtllm::w8a8
