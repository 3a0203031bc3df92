// The kernels for few tokens, Int8 operands: tile sizes and how deep their rings are.
#include "w8a8_split.cuh"

namespace trtllm::w8a8 {

// Rings of about 70 KiB let three blocks share a multiprocessor, those of the wide tiles two or one.
cudaError_t launch_split_int8(const trtllm_w8a8_params& p, Split how, cudaStream_t stream) {
    if (how.rows == 64 && how.cols == 8) return launch_split<SplitTile<Int8, 64, 8, 7>>(p, how.split, stream);
    if (how.rows == 64 && how.cols == 16) return launch_split<SplitTile<Int8, 64, 16, 6>>(p, how.split, stream);
    if (how.rows == 64 && how.cols == 32) return launch_split<SplitTile<Int8, 64, 32, 5>>(p, how.split, stream);
    if (how.rows == 64 && how.cols == 64) return launch_split<SplitTile<Int8, 64, 64, 5>>(p, how.split, stream);
    if (how.rows == 128 && how.cols == 32) return launch_split<SplitTile<Int8, 128, 32, 5>>(p, how.split, stream);
    if (how.rows == 128 && how.cols == 64) return launch_split<SplitTile<Int8, 128, 64, 4>>(p, how.split, stream);
    return launch_split<SplitTile<Int8, 128, 128, 3>>(p, how.split, stream);
}

}  // namespace trtllm::w8a8
