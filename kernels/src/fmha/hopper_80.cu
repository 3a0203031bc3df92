// Hopper's attention kernels for heads of 80.
#include "fmha_hopper_launch.cuh"

namespace trtllm::fmha {

cudaError_t launch_hopper_80_half(const trtllm_fmha_params& p, cudaStream_t stream) {
    return launch_hopper<__half, 80>(p, stream);
}
cudaError_t launch_hopper_80_bfloat16(const trtllm_fmha_params& p, cudaStream_t stream) {
    return launch_hopper<__nv_bfloat16, 80>(p, stream);
}

}  // namespace trtllm::fmha
