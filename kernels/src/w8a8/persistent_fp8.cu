// The kernels for many tokens, float8: the accurate one keeps two sets of sums, so its tile is narrower.
#include "w8a8_persistent.cuh"

namespace trtllm::w8a8 {

cudaError_t launch_persistent_fp8(const trtllm_w8a8_params& p, cudaStream_t stream) {
    return launch_persistent<PersistentTile<Fp8, 192, 4, true>>(p, stream);
}

cudaError_t launch_persistent_fp8_fast(const trtllm_w8a8_params& p, cudaStream_t stream) {
    return launch_persistent<PersistentTile<Fp8, 256, 4, false>>(p, stream);
}

}  // namespace trtllm::w8a8
