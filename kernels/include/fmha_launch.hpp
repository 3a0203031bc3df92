// What the launcher of the attention kernels knows of its parts, each compiled in a file of its own.
#pragma once

#include <cuda_runtime_api.h>

#include "trtllm_kernels/fmha.h"

namespace trtllm::fmha {

// Checked parameters in; the error of setting up the launch out.
cudaError_t launch_portable_half(const trtllm_fmha_params& p, cudaStream_t stream);
cudaError_t launch_portable_half_sums(const trtllm_fmha_params& p, cudaStream_t stream);
cudaError_t launch_portable_bfloat16(const trtllm_fmha_params& p, cudaStream_t stream);
cudaError_t launch_hopper(const trtllm_fmha_params& p, cudaStream_t stream);
cudaError_t launch_hopper_64_half(const trtllm_fmha_params& p, cudaStream_t stream);
cudaError_t launch_hopper_64_bfloat16(const trtllm_fmha_params& p, cudaStream_t stream);
cudaError_t launch_hopper_80_half(const trtllm_fmha_params& p, cudaStream_t stream);
cudaError_t launch_hopper_80_bfloat16(const trtllm_fmha_params& p, cudaStream_t stream);
cudaError_t launch_hopper_96_half(const trtllm_fmha_params& p, cudaStream_t stream);
cudaError_t launch_hopper_96_bfloat16(const trtllm_fmha_params& p, cudaStream_t stream);
cudaError_t launch_hopper_128_half(const trtllm_fmha_params& p, cudaStream_t stream);
cudaError_t launch_hopper_128_bfloat16(const trtllm_fmha_params& p, cudaStream_t stream);
cudaError_t launch_hopper_256_half(const trtllm_fmha_params& p, cudaStream_t stream);
cudaError_t launch_hopper_256_bfloat16(const trtllm_fmha_params& p, cudaStream_t stream);
/// Hopper's kernels are empty where the library was not built for 90a.
bool hopper_was_compiled();

/// Shared memory, grid and launch attributes around one kernel.
template <typename... Parameters>
cudaError_t start(void (*kernel)(Parameters...), dim3 grid, int threads, size_t shared, bool pdl, cudaStream_t stream,
                  const Parameters&... arguments) {
    const cudaError_t code =
        cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared));
    if (code != cudaSuccess) return code;
    cudaLaunchAttribute attribute{};
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = grid;
    config.blockDim = dim3(unsigned(threads));
    config.dynamicSmemBytes = shared;
    config.stream = stream;
    config.attrs = &attribute;
    config.numAttrs = pdl ? 1 : 0;
    void* pointers[] = {const_cast<void*>(static_cast<const void*>(&arguments))...};
    return cudaLaunchKernelExC(&config, reinterpret_cast<const void*>(kernel), pointers);
}

}  // namespace trtllm::fmha
