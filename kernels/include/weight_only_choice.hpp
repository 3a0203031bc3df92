// Which of the tensor cores' kernels serves a product, and with which tiles.
#pragma once

#include "weight_only.hpp"

namespace trtllm::weight_only {

enum class Kernel { kPortable, kPersistent, kSplit };

/// One way to serve. As a tactic: 101 the portable kernel; 102, 103, 104 the persistent one with tiles of 128 rows x
/// 256 tokens, 128 x 128 and 192 x 128; 1000 log2(tokens) + 100 groups + 10 + split the split kernel with tiles of
/// 64 groups rows x tokens in clusters of split blocks.
struct Choice {
    Kernel kernel;
    int tokens, groups, split;
};

/// False where `tactic` names no kernel of compute capability 9.0.
bool read_tactic(int tactic, Choice* choice);

/// The fastest for this product on the current GPU, of compute capability 9.0, by what tiles were measured to take.
Choice by_size(const trtllm_weight_only_gemm_params& p);

}  // namespace trtllm::weight_only
