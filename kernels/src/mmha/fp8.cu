// Generation attention over a cache of E4M3.
#include "mmha_launch.cuh"

cudaError_t trtllm::mmha::launch_fp8(const trtllm_mmha_params& p, cudaStream_t stream) {
    return launch_cache<__nv_fp8_e4m3>(p, stream);
}
