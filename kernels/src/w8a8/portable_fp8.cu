#include "w8a8_portable.cuh"

namespace trtllm::w8a8 {

cudaError_t launch_portable_fp8(const trtllm_w8a8_params& p, cudaStream_t stream) {
    return launch_portable_type<float>(p, stream);
}

}  // namespace trtllm::w8a8
