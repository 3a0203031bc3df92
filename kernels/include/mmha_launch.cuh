// Grid, shared memory and attributes around one kernel of generation attention.
#pragma once

#include "mmha_grid.cuh"
#include "mmha_launch.hpp"
#include "registry.hpp"

namespace trtllm::mmha {

static_assert(kMaxBlocks == kMaxGrid);

struct DeviceShared {
    int an_sm = 0, a_block = 0;
};

inline cudaError_t device_shared(int device, DeviceShared& found) {
    const cudaError_t code =
        cudaDeviceGetAttribute(&found.an_sm, cudaDevAttrMaxSharedMemoryPerMultiprocessor, device);
    if (code != cudaSuccess) return code;
    return cudaDeviceGetAttribute(&found.a_block, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
}

// As many buffers a warp as leave room for as many blocks an SM as registers do; fewer blocks if need be.
template <typename S>
int choose_stages(const DeviceShared& shared) {
    constexpr int kReserved = 1024;  // of each block
    for (int blocks = S::kResident; blocks > 0; --blocks) {
        const int room = min(shared.a_block, shared.an_sm / blocks - kReserved) - S::kFixedBytes;
        const int stages = min(kMaxStages, room / S::kStageBytes);
        if (stages >= 3 || (blocks == 1 && stages == 2)) return stages;
    }
    return 0;
}

template <typename C, int D, int NT>
cudaError_t launch_one(const trtllm_mmha_params& p, cudaStream_t stream) {
    using S = Shape<C, D, NT>;
    constexpr int kDevices = 64;
    const void* const kernel = reinterpret_cast<const void*>(mmha_kernel<C, D, NT>);
    int device = 0;
    cudaError_t code = cudaGetDevice(&device);
    if (code != cudaSuccess) return code;
    // what follows costs microseconds and never changes: kept for each device and number of stages (a benign race, all
    // threads store the same)
    static int chosen[kDevices], resident[kDevices][kMaxStages + 1], most_shared[kDevices];
    const int slot = device < kDevices ? device : kDevices - 1;
    if (chosen[slot] == 0 || device >= kDevices) {
        DeviceShared shared;
        code = device_shared(device, shared);
        if (code != cudaSuccess) return code;
        const int stages = choose_stages<S>(shared);
        if (stages == 0) return cudaErrorInvalidConfiguration;
        code = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared.a_block);
        if (code != cudaSuccess) return code;
        for (int n = 0; n <= kMaxStages; ++n) resident[slot][n] = 0;
        most_shared[slot] = shared.a_block;
        chosen[slot] = stages;
    }
    const int stages = p.stages > 0 ? p.stages : chosen[slot];
    const int shared = S::kFixedBytes + max(stages * S::kStageBytes, S::kMergeBytes);
    if (resident[slot][stages] == 0) {
        if (shared > most_shared[slot]) return cudaErrorInvalidConfiguration;
        int blocks = 0;
        code = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, S::kThreads, size_t(shared));
        if (code != cudaSuccess) return code;
        if (blocks == 0) return cudaErrorInvalidConfiguration;
        resident[slot][stages] = min(blocks, kMostBlocksAnSm);
    }
    const int group_rows = p.heads / p.kv_heads * p.q_length;
    const int64_t pairs = int64_t(p.batch) * p.kv_heads * ((group_rows + S::kRows - 1) / S::kRows);
    const int64_t units = pairs * ((p.max_length + S::kUnit - 1) / S::kUnit);
    int64_t grid = p.blocks > 0 ? p.blocks : int64_t(resident[slot][stages]) * multiprocessors();
    grid = max(int64_t(1), min(min(grid, int64_t(kMaxGrid)), max(units, int64_t(p.batch))));

    cudaLaunchAttribute attribute{};
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(unsigned(grid));
    config.blockDim = dim3(S::kThreads);
    config.dynamicSmemBytes = size_t(shared);
    config.stream = stream;
    config.attrs = &attribute;
    config.numAttrs = p.pdl && compute_capability() >= 90 ? 1 : 0;
    return cudaLaunchKernelEx(&config, mmha_kernel<C, D, NT>, p, stages);
}

template <typename C, int D>
cudaError_t launch_size(const trtllm_mmha_params& p, cudaStream_t stream) {
    return rows_of(p) == 8 ? launch_one<C, D, 1>(p, stream) : launch_one<C, D, 2>(p, stream);
}

template <typename C>
cudaError_t launch_cache(const trtllm_mmha_params& p, cudaStream_t stream) {
    switch (p.head_size) {
        case 64: return launch_size<C, 64>(p, stream);
        case 80: return launch_size<C, 80>(p, stream);
        case 96: return launch_size<C, 96>(p, stream);
        case 128: return launch_size<C, 128>(p, stream);
        default: return launch_size<C, 256>(p, stream);
    }
}

}  // namespace trtllm::mmha
