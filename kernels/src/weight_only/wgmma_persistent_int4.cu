// Instances of the persistent kernel for int4 weights.
#include "weight_only_persistent.cuh"

namespace trtllm::weight_only {

cudaError_t persistent_int4(const HopperLaunch& launch) {
    return launch.half ? launch_persistent<__half, Weight::kInt4>(launch) : launch_persistent<__nv_bfloat16, Weight::kInt4>(launch);
}

}  // namespace trtllm::weight_only
