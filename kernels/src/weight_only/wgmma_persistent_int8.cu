// Instances of the persistent kernel for int8 weights.
#include "weight_only_persistent.cuh"

namespace trtllm::weight_only {

cudaError_t persistent_int8(const HopperLaunch& launch) {
    return launch.half ? launch_persistent<__half, Weight::kInt8>(launch) : launch_persistent<__nv_bfloat16, Weight::kInt8>(launch);
}

}  // namespace trtllm::weight_only
