// Hopper's attention kernels for heads of 64.
#include "fmha_hopper_launch.cuh"

namespace trtllm::fmha {

cudaError_t launch_hopper_64_half(const trtllm_fmha_params& p, cudaStream_t stream) {
    return launch_hopper<__half, 64>(p, stream);
}
cudaError_t launch_hopper_64_bfloat16(const trtllm_fmha_params& p, cudaStream_t stream) {
    return launch_hopper<__nv_bfloat16, 64>(p, stream);
}

}  // namespace trtllm::fmha
