// Instances of the split kernel for int8 weights.
#include "weight_only_split.cuh"

namespace trtllm::weight_only {

cudaError_t split_int8(const HopperLaunch& launch) {
    return launch.half ? launch_split_of<__half, Weight::kInt8>(launch) : launch_split_of<__nv_bfloat16, Weight::kInt8>(launch);
}

}  // namespace trtllm::weight_only
