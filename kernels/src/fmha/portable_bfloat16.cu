// The portable attention kernels for bfloat16.
#include "fmha_launch.hpp"
#include "fmha_portable.cuh"

namespace trtllm::fmha {
namespace {

template <int D>
cudaError_t launch(const trtllm_fmha_params& p, cudaStream_t stream) {
    const dim3 grid(unsigned((p.max_q_length + Portable<D>::kRows - 1) / Portable<D>::kRows), unsigned(p.heads),
                    unsigned(p.batch));
    return start(portable_kernel<__nv_bfloat16, D, false>, grid, Portable<D>::kThreads, Portable<D>::kShared, p.pdl != 0, stream, p);
}

}  // namespace

cudaError_t launch_portable_bfloat16(const trtllm_fmha_params& p, cudaStream_t stream) {
    switch (p.head_size) {
        case 64: return launch<64>(p, stream);
        case 80: return launch<80>(p, stream);
        case 96: return launch<96>(p, stream);
        case 128: return launch<128>(p, stream);
        default: return launch<256>(p, stream);
    }
}

}  // namespace trtllm::fmha
