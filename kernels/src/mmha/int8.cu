// Generation attention over a cache of int8.
#include "mmha_launch.cuh"

cudaError_t trtllm::mmha::launch_int8(const trtllm_mmha_params& p, cudaStream_t stream) {
    return launch_cache<int8_t>(p, stream);
}
