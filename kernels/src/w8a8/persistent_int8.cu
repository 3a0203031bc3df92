// The kernel for many tokens, int8: sums are exact in the matrix unit, so tiles are as wide as the registers allow.
#include "w8a8_persistent.cuh"

namespace trtllm::w8a8 {

cudaError_t launch_persistent_int8(const trtllm_w8a8_params& p, cudaStream_t stream) {
    return launch_persistent<PersistentTile<Int8, 256, 4, false>>(p, stream);
}

}  // namespace trtllm::w8a8
