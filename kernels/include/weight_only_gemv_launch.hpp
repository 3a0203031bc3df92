// The kernels for few tokens, by type; each is compiled in a file of its own.
#pragma once

#include "weight_only.hpp"

namespace trtllm::weight_only {

const void* gemv_int4_kernel(int32_t dtype, int32_t group);
const void* gemv_8bit_kernel(int32_t dtype, int32_t weight_dtype);
const void* gemv_dense_kernel(int32_t dtype);

}  // namespace trtllm::weight_only
