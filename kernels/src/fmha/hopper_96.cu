// Hopper's attention kernels for heads of 96.
#include "fmha_hopper_launch.cuh"

namespace trtllm::fmha {

cudaError_t launch_hopper_96_half(const trtllm_fmha_params& p, cudaStream_t stream) {
    return launch_hopper<__half, 96>(p, stream);
}
cudaError_t launch_hopper_96_bfloat16(const trtllm_fmha_params& p, cudaStream_t stream) {
    return launch_hopper<__nv_bfloat16, 96>(p, stream);
}

}  // namespace trtllm::fmha
