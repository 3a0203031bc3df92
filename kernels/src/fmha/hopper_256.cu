// Hopper's attention kernels for heads of 256.
#include "fmha_hopper_launch.cuh"

namespace trtllm::fmha {

cudaError_t launch_hopper_256_half(const trtllm_fmha_params& p, cudaStream_t stream) {
    return launch_hopper<__half, 256>(p, stream);
}
cudaError_t launch_hopper_256_bfloat16(const trtllm_fmha_params& p, cudaStream_t stream) {
    return launch_hopper<__nv_bfloat16, 256>(p, stream);
}

}  // namespace trtllm::fmha
