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

// As many buffers a warp, up to `most`, as leave room for so many blocks an SM; fewer blocks if need be.
template <typename S>
int choose_stages(const DeviceShared& shared, int blocks, int most) {
    constexpr int kReserved = 1024;  // of each block
    for (; blocks > 0; --blocks) {
        const int room = min(shared.a_block, shared.an_sm / blocks - kReserved) - S::kFixedBytes;
        const int stages = min(most, room / S::kStageBytes);
        if (stages >= 3 || (blocks == 1 && stages == 2)) return stages;
    }
    return 0;
}

// How many blocks so few pairs are spread over that the putting together counts: `units` a pair, `most` blocks in all.
// Without a limit where the pairs are many. Microseconds fitted to measurements on an H200.
template <typename S>
int64_t choose_blocks(int64_t pairs, int64_t units, int64_t most) {
    constexpr double kUnit = 0.75;      // of one block, if memory keeps up
    constexpr double kBytes = 32768.0;  // an SM gets a microsecond
    constexpr double kRound = 1.3;      // of parts that `combine` asks for together
    constexpr double kLate = 2.0;       // where SMs are so full that the next kernel cannot start early
    const int64_t sms = multiprocessors();
    int64_t best = INT64_MAX;
    double least = 1e30;
    for (int64_t share = kPartsAtOnce; pairs * share <= most; share += kPartsAtOnce) {
        const int64_t blocks = pairs * share;
        const double memory = double(blocks) * S::kStageBytes / (double(sms) * kBytes);
        const double time = double((units + share - 1) / share) * (memory > kUnit ? memory : kUnit) +
                            double(share / kPartsAtOnce) * kRound + (blocks > sms ? kLate : 0.0);
        if (time < least) least = time, best = blocks;
    }
    return best;
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
    static DeviceShared found[kDevices];
    static int resident[kDevices][kMaxStages + 1];
    const int slot = device < kDevices ? device : kDevices - 1;
    if (found[slot].a_block == 0 || device >= kDevices) {
        DeviceShared shared;
        code = device_shared(device, shared);
        if (code != cudaSuccess) return code;
        code = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared.a_block);
        if (code != cudaSuccess) return code;
        for (int n = 0; n <= kMaxStages; ++n) resident[slot][n] = 0;
        found[slot].an_sm = shared.an_sm;
        found[slot].a_block = shared.a_block;  // last: it says that all is known
    }
    const int sms = multiprocessors(), group_rows = p.heads / p.kv_heads * p.q_length;
    const int64_t pairs = int64_t(p.batch) * p.kv_heads * ((group_rows + S::kRows - 1) / S::kRows);
    const int64_t units = (p.max_length + S::kUnit - 1) / S::kUnit;
    const int64_t wanted = p.blocks > 0 ? p.blocks : choose_blocks<S>(pairs, units, int64_t(S::kResident) * sms);
    // deeper rings were slower: bytes that are needed first then wait for others
    constexpr bool kEight = Cached<C>::kBytes == 1;
    int stages = p.stages;
    if (stages == 0 && wanted <= sms) stages = choose_stages<S>(found[slot], 1, kEight ? kMaxStages : 4);
    if (stages == 0 && wanted > sms) stages = choose_stages<S>(found[slot], S::kResident, kEight ? 4 : kMaxStages);
    const int shared = S::kFixedBytes + max(stages * S::kStageBytes, S::kMergeBytes);
    if (stages == 0 || shared > found[slot].a_block) return cudaErrorInvalidConfiguration;
    if (resident[slot][stages] == 0) {
        int blocks = 0;
        code = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, S::kThreads, size_t(shared));
        if (code != cudaSuccess) return code;
        if (blocks == 0) return cudaErrorInvalidConfiguration;
        resident[slot][stages] = min(blocks, kMostBlocksAnSm);
    }
    int64_t grid = p.blocks > 0 ? p.blocks : min(wanted, int64_t(resident[slot][stages]) * sms);
    grid = max(int64_t(1), min(min(grid, int64_t(kMaxGrid)), max(pairs * units, int64_t(p.batch))));

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
