// The 8-bit product: checks, and which kernel serves which shape. Measurements behind the choice: docs/kernels.md.
#include <cuda_runtime.h>

#include <cstring>

#include "registry.hpp"
#include "w8a8_launch.hpp"

namespace trtllm {
namespace {

const Capability int8_capability(
    R"({"kernel": "w8a8", "family": "w8a8", "min_compute_capability": 80, "dtypes": ["int8"],
        "sum": "int32", "out": ["float16", "bfloat16"], "a_scale": ["tensor", "token"],
        "w_scale": ["tensor", "channel"], "epilogue": ["bias", "residual"], "multiple_of": {"k": 16}, "max_k": 131056,
        "tuned_for": [90]})");
const Capability fp8_capability(
    R"({"kernel": "w8a8 float8", "family": "w8a8", "min_compute_capability": 89, "dtypes": ["float8_e4m3"],
        "sum": "float32, of partial sums of 128", "out": ["float16", "bfloat16"], "a_scale": ["tensor", "token"],
        "w_scale": ["tensor", "channel"], "epilogue": ["bias", "residual"], "multiple_of": {"k": 16},
        "tuned_for": [90]})");
const StructSize size("trtllm_w8a8_params", sizeof(trtllm_w8a8_params));

// A tactic is 1 (portable), 2 (persistent), or rows * 10000 + cols * 10 + split of the kernel for few tokens.
constexpr int kPortable = 1, kPersistent = 2;
constexpr int kTiles[][2] = {{64, 8}, {64, 16}, {64, 32}, {64, 64}, {128, 32}, {128, 64}, {128, 128}};
constexpr int kSplits[] = {1, 2, 4, 8};
constexpr int kTileCount = sizeof kTiles / sizeof kTiles[0];

constexpr int split_tactic(int rows, int cols, int split) { return rows * 10000 + cols * 10 + split; }

bool is_split(int tactic, w8a8::Split* how) {
    for (const auto& tile : kTiles) {
        for (const int split : kSplits) {
            if (tactic == split_tactic(tile[0], tile[1], split)) {
                *how = {tile[0], tile[1], split};
                return true;
            }
        }
    }
    return false;
}

// Hopper's kernels are empty in code for other architectures, its plain 9.0 included.
bool has_hopper_code() {
    static const bool has = std::strstr(trtllm_build_info(), "\"90a\"") != nullptr;
    return has;
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

int choose(const trtllm_w8a8_params& p, int capability, int multiprocessors) {
    if (capability != 90 || !has_hopper_code()) return kPortable;
    // columns of a persistent tile, and how well its clusters of two blocks fill the GPU
    const int64_t width = p.dtype == TRTLLM_FLOAT8_E4M3 && !p.fast_accumulation ? 192 : 256;
    const int64_t clusters = multiprocessors / 2, large = ceil_div(p.m, 256) * ceil_div(p.n, width);
    if (p.m > 128) {
        const double filled = double(large) / double(ceil_div(large, clusters) * clusters);
        if (large >= clusters * 3 / 4 || filled > 0.7) return kPersistent;
    }
    const int cols = p.m <= 8 ? 8 : p.m <= 16 ? 16 : p.m <= 32 ? 32 : p.m <= 64 ? 64 : 128;
    // enough blocks to keep every multiprocessor's memory pipe full, none with too short a share of K
    const auto tiles = [&](int rows) { return ceil_div(p.n, rows) * ceil_div(p.m, cols); };
    const auto split_of = [&](int rows) {
        const int64_t wanted = rows == 64 ? 2 * multiprocessors : multiprocessors;
        int split = 1;
        while (split < 8 && tiles(rows) * split * 2 <= wanted * 5 / 4 && p.k >= 128 * 4 * split * 2) split *= 2;
        return split;
    };
    if (p.m > 32 && p.m <= 64) {
        // Clusters of at most two blocks are spread evenly, where larger ones crowd on a part of the multiprocessors: best
        // where they give nearly every multiprocessor one block.
        for (int split = 1; split <= 2; ++split) {
            const int64_t blocks = tiles(64) * split;
            if (p.k >= 1024 * (split - 1) && blocks <= multiprocessors && blocks * 5 >= int64_t(multiprocessors) * 4) {
                return split_tactic(64, cols, split);
            }
        }
    }
    // smaller blocks, which read the activations twice as often, only where large ones would leave multiprocessors idle
    const bool idle = tiles(128) * split_of(128) * 5 < int64_t(multiprocessors) * 4;
    const int rows = p.m <= 32 || (p.m <= 64 && idle) ? 64 : 128;
    return split_tactic(rows, cols, split_of(rows));
}

}  // namespace
}  // namespace trtllm

extern "C" int trtllm_w8a8_supports(const trtllm_w8a8_params* p, int compute_capability) {
    using namespace trtllm;
    const auto invalid = cudaErrorInvalidValue;
    const int major = compute_capability / 10, minor = compute_capability % 10;
    if (p->dtype != TRTLLM_INT8 && p->dtype != TRTLLM_FLOAT8_E4M3) {
        return refuse(invalid, "w8a8 multiplies int8 or float8_e4m3, not %s", name_of(trtllm_dtype(p->dtype)));
    }
    if (compute_capability < 80) {
        return refuse(cudaErrorInvalidDeviceFunction,
                      "w8a8 needs compute capability 8.0, this GPU has %d.%d: use float16", major, minor);
    }
    if (p->dtype == TRTLLM_FLOAT8_E4M3 && compute_capability < 89) {
        return refuse(cudaErrorInvalidDeviceFunction,
                      "w8a8 multiplies float8_e4m3 from compute capability 8.9 on, this GPU has %d.%d: use int8", major,
                      minor);
    }
    if (p->out_dtype != TRTLLM_FLOAT16 && p->out_dtype != TRTLLM_BFLOAT16) {
        return refuse(invalid, "w8a8 gives float16 or bfloat16, not %s", name_of(trtllm_dtype(p->out_dtype)));
    }
    const long long m = p->m, n = p->n, k = p->k;
    if (m < 0 || n < 0 || k < 1 || m >= (1 << 23) || n >= (1ll << 31) - 256 || k >= (1ll << 31) - 256) {
        return refuse(invalid, "w8a8 takes up to 2^23 rows of a, and n and k below 2^31, not m %lld, n %lld, k %lld", m,
                      n, k);
    }
    if (k % 16 != 0) {
        return refuse(invalid, "w8a8 needs k to be a multiple of 16, not %lld: pad a and w with zeros", k);
    }
    if (p->dtype == TRTLLM_INT8 && k >= 131072) {
        return refuse(invalid, "w8a8 sums int8 products in int32, which k %lld could overflow: split k below 131072",
                      k);
    }
    if (p->a_stride % 16 != 0 || p->w_stride % 16 != 0 || (m > 1 && p->a_stride < k) || (n > 1 && p->w_stride < k)) {
        return refuse(
            invalid,
            "w8a8 needs rows of a and w a multiple of 16 elements apart and at least k %lld, not %lld and %lld: copy "
            "them into contiguous tensors",
            k, static_cast<long long>(p->a_stride), static_cast<long long>(p->w_stride));
    }
    if (m > 1 && (p->out_stride < n || (p->residual != nullptr && p->residual_stride < n))) {
        return refuse(invalid, "w8a8 needs rows of out and residual at least n %lld elements apart, not %lld and %lld",
                      n, static_cast<long long>(p->out_stride), static_cast<long long>(p->residual_stride));
    }
    w8a8::Split how;
    if (p->tactic != 0 && p->tactic != kPortable && p->tactic != kPersistent && !is_split(p->tactic, &how)) {
        return refuse(invalid, "w8a8 knows no tactic %d: use 0", p->tactic);
    }
    if (p->tactic > kPortable && compute_capability != 90) {
        return refuse(invalid, "w8a8's tactic %d needs compute capability 9.0, this GPU has %d.%d: use 0", p->tactic,
                      major, minor);
    }
    if (p->tactic > kPortable && !has_hopper_code()) {
        return refuse(cudaErrorInvalidDeviceFunction,
                      "w8a8's tactic %d is not in this library, which was built without architecture 90a: use 0",
                      p->tactic);
    }
    return cudaSuccess;
}

extern "C" int trtllm_w8a8_choose(const trtllm_w8a8_params* p, int compute_capability, int multiprocessors) {
    if (trtllm_w8a8_supports(p, compute_capability) != cudaSuccess) return 0;
    return p->tactic != 0 ? p->tactic : trtllm::choose(*p, compute_capability, multiprocessors);
}

extern "C" int trtllm_w8a8_tactic(int i) {
    using namespace trtllm;
    if (i == kPortable || i == kPersistent) return i;
    const int at = i - 3;
    if (at < 0 || at >= kTileCount * 4) return 0;
    return split_tactic(kTiles[at / 4][0], kTiles[at / 4][1], kSplits[at % 4]);
}

extern "C" int trtllm_w8a8(const trtllm_w8a8_params* p, trtllm_stream stream) {
    using namespace trtllm;
    const int capability = compute_capability();
    const int refused = trtllm_w8a8_supports(p, capability);
    if (refused != cudaSuccess) return refused;
    if (p->m == 0 || p->n == 0) return cudaSuccess;
    if (p->a == nullptr || p->w == nullptr || p->out == nullptr || p->a_scale == nullptr || p->w_scale == nullptr) {
        return refuse(cudaErrorInvalidValue,
                      "w8a8 was given a null pointer: a, w, a_scale, w_scale and out are needed");
    }
    if (reinterpret_cast<uintptr_t>(p->a) % 16 != 0 || reinterpret_cast<uintptr_t>(p->w) % 16 != 0) {
        return refuse(cudaErrorInvalidValue, "w8a8 needs a and w to start at multiples of 16 bytes: copy the view");
    }
    const auto on = static_cast<cudaStream_t>(stream);
    const bool int8 = p->dtype == TRTLLM_INT8;
    const int tactic = p->tactic != 0 ? p->tactic : choose(*p, capability, multiprocessors());
    if (tactic == kPortable) return int8 ? w8a8::launch_portable_int8(*p, on) : w8a8::launch_portable_fp8(*p, on);
    if (tactic == kPersistent) {
        if (int8) return w8a8::launch_persistent_int8(*p, on);
        return p->fast_accumulation ? w8a8::launch_persistent_fp8_fast(*p, on) : w8a8::launch_persistent_fp8(*p, on);
    }
    w8a8::Split how;
    is_split(tactic, &how);
    return int8 ? w8a8::launch_split_int8(*p, how, on) : w8a8::launch_split_fp8(*p, how, on);
}
