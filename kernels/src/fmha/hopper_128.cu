// Hopper's attention kernels for heads of 128.
#include "fmha_hopper_launch.cuh"

namespace trtllm::fmha {

cudaError_t launch_hopper_128_half(const trtllm_fmha_params& p, cudaStream_t stream) {
    return launch_hopper<__half, 128>(p, stream);
}
cudaError_t launch_hopper_128_bfloat16(const trtllm_fmha_params& p, cudaStream_t stream) {
    return launch_hopper<__nv_bfloat16, 128>(p, stream);
}

}  // namespace trtllm::fmha
