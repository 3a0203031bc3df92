// Generation attention over a cache of bfloat16.
#include "mmha_launch.cuh"

cudaError_t trtllm::mmha::launch_bfloat16(const trtllm_mmha_params& p, cudaStream_t stream) {
    return launch_cache<__nv_bfloat16>(p, stream);
}
