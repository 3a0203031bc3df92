// Generation attention over a cache of float16.
#include "mmha_launch.cuh"

cudaError_t trtllm::mmha::launch_half(const trtllm_mmha_params& p, cudaStream_t stream) {
    return launch_cache<__half>(p, stream);
}
