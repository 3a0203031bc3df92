// The kernels for few tokens, by type; each is compiled in a file of its own.
#pragma once

#include "weight_only.hpp"

namespace trtllm::weight_only {

// Activations converted to scaled float16 numbers or as they are, and those of a cluster's blocks, as they are.
enum class Form { kScaled, kPlain, kCluster };

const void* gemv_int4_kernel(int32_t dtype, int32_t group, Form form);
const void* gemv_8bit_kernel(int32_t dtype, int32_t weight_dtype, Form form);
const void* gemv_dense_kernel(int32_t dtype, Form form);

}  // namespace trtllm::weight_only
