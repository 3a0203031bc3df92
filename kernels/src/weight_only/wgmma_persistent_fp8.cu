// Instances of the persistent kernel for fp8 weights.
#include "weight_only_persistent.cuh"

namespace trtllm::weight_only {

cudaError_t persistent_fp8(const HopperLaunch& launch) {
    return launch.half ? launch_persistent<__half, Weight::kFp8>(launch) : launch_persistent<__nv_bfloat16, Weight::kFp8>(launch);
}

}  // namespace trtllm::weight_only
