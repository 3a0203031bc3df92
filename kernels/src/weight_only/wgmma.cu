// The tensor-core kernels' entry: which kernel, which tiles, which parts of K; tensor maps without a link to libcuda.
#include <cuda.h>
#include <cuda_runtime.h>

#include <algorithm>

#include "registry.hpp"
#include "weight_only.hpp"
#include "weight_only_choice.hpp"
#include "weight_only_tensor_launch.hpp"
#include "weight_only_tile.cuh"

namespace trtllm::weight_only {
namespace {

using Encode = decltype(&cuTensorMapEncodeTiled);

Encode find_encode() {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result = cudaDriverEntryPointSymbolNotFound;
#if CUDART_VERSION >= 12050
    const cudaError_t code =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result);
#else
    const cudaError_t code = cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &found, cudaEnableDefault, &result);
#endif
    if (code != cudaSuccess || result != cudaDriverEntryPointSuccess) return nullptr;
    return reinterpret_cast<Encode>(found);
}

struct MapOf {
    CUtensorMapDataType type;
    CUtensorMapSwizzle swizzle;
    int element_bytes;
};

cudaError_t tensor_map(CUtensorMap* map, const MapOf& kind, const void* base, int64_t rows, int64_t columns,
                       int64_t row_bytes, int box_rows, int box_columns) {
    static const Encode encode = find_encode();
    if (encode == nullptr) {
        return refuse(cudaErrorNotSupported,
                      "weight_only_gemm needs the driver's cuTensorMapEncodeTiled: update the driver to 12.0");
    }
    const cuuint64_t extents[2] = {cuuint64_t(columns), cuuint64_t(rows)};
    const cuuint64_t strides[1] = {cuuint64_t(row_bytes)};
    const cuuint32_t box[2] = {cuuint32_t(box_columns), cuuint32_t(box_rows)};
    const cuuint32_t steps[2] = {1, 1};
    const CUresult result = encode(map, kind.type, 2, const_cast<void*>(base), extents, strides, box, steps,
                                   CU_TENSOR_MAP_INTERLEAVE_NONE, kind.swizzle, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                                   CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    if (result == CUDA_SUCCESS) return cudaSuccess;
    return refuse(cudaErrorInvalidValue, "weight_only_gemm: no tensor map for %lld rows of %lld bytes (CUresult %d)",
                  static_cast<long long>(rows), static_cast<long long>(row_bytes), int(result));
}

TensorArguments arguments_of(const trtllm_weight_only_gemm_params& p) {
    TensorArguments a = {};
    a.bias = p.bias;
    a.residual = p.residual;
    a.scale = static_cast<const float*>(p.scale);
    a.out = p.out;
    a.residual_stride = p.residual_stride;
    a.out_stride = p.out_stride;
    a.m = int32_t(p.m);
    a.n = int32_t(p.n);
    a.outputs = int32_t(outputs(p));
    a.k = int32_t(p.k);
    a.stages = int32_t((p.k + kStageDepth - 1) / kStageDepth);
    a.stripe_bytes = tile_bytes(p.weight_dtype, p.group, p.has_zero != 0) * (kStageDepth / tile_depth(p.weight_dtype));
    a.group_shift = p.group == 32 ? 0 : p.group == 64 ? 1 : 2;
    a.has_zero = p.has_zero;
    a.gate = p.gate;
    a.pdl = p.pdl;
    const uintptr_t places = reinterpret_cast<uintptr_t>(p.out) | reinterpret_cast<uintptr_t>(p.residual);
    a.vector = places % 16 == 0 && p.out_stride % 8 == 0 && (p.residual == nullptr || p.residual_stride % 8 == 0);
    a.multiplier = p.weight_multiplier;
    return a;
}

int ceil_div(int64_t a, int64_t b) { return int((a + b - 1) / b); }

Choice choice_of(const trtllm_weight_only_gemm_params& p, int compute_capability) {
    Choice c = {Kernel::kPortable, 0, 0, 0};
    // code for 9.0 is built with Hopper's own instructions (90a); other GPUs lack wgmma
    if (compute_capability != 90 || p.tactic == 101) return c;
    if (p.tactic > 100 && read_tactic(p.tactic, &c)) return c;
    return by_size(p);
}

cudaError_t hopper(const trtllm_weight_only_gemm_params& p, const TensorArguments& a, const Choice& c, int sms,
                   cudaStream_t stream) {
    const bool persistent = c.kernel == Kernel::kPersistent;
    const int tile_tokens = c.tokens, rows = 64 * c.groups;
    const int share = persistent ? 2 : 1;  // blocks of rows that copy activations for each other
    CUtensorMap x_map, weight_map;
    const MapOf wide = {CU_TENSOR_MAP_DATA_TYPE_UINT16, CU_TENSOR_MAP_SWIZZLE_128B, 2};
    // eight bytes an element: a box is at most 256 of them wide, and a stripe of a stage has up to 2048 bytes
    const MapOf bytes = {CU_TENSOR_MAP_DATA_TYPE_FLOAT64, CU_TENSOR_MAP_SWIZZLE_NONE, 8};
    const int64_t x_stride = p.m > 1 ? p.x_stride : (p.k + 7) / 8 * 8;
    cudaError_t code = tensor_map(&x_map, wide, p.x, p.m, p.k, x_stride * 2, tile_tokens / share, 64);
    if (code != cudaSuccess) return code;
    const int64_t row_bytes =
        tiles_along_k(p.k, p.weight_dtype) * tile_bytes(p.weight_dtype, p.group, p.has_zero != 0);
    code = tensor_map(&weight_map, bytes, p.weight, stripes(p.n), row_bytes / 8, row_bytes, rows / 16, a.stripe_bytes / 8);
    if (code != cudaSuccess) return code;

    HopperLaunch l = {};
    l.x_map = &x_map;
    l.weight_map = &weight_map;
    l.arguments = &a;
    l.plan = {std::min(c.split, int(a.stages)), ceil_div(p.m, tile_tokens)};
    l.tokens = tile_tokens;
    l.groups = c.groups;
    l.row_tiles = ceil_div(ceil_div(p.n, rows), share) * share;
    l.blocks = std::min(sms / 2, l.row_tiles / 2 * l.plan.token_tiles) * 2;
    l.half = p.dtype == TRTLLM_FLOAT16;
    l.stream = stream;
    if (p.weight_dtype == TRTLLM_INT4) return persistent ? persistent_int4(l) : split_int4(l);
    if (p.weight_dtype == TRTLLM_INT8) return persistent ? persistent_int8(l) : split_int8(l);
    return persistent ? persistent_fp8(l) : split_fp8(l);
}

}  // namespace

cudaError_t allow_shared(const void* kernel, int bytes, unsigned long long& done_devices) {
    int device = 0;
    cudaError_t code = cudaGetDevice(&device);
    // two threads at once set the same limit twice, which is harmless
    if (code == cudaSuccess && (device >= 64 || (done_devices >> device & 1) == 0)) {
        code = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
        if (code == cudaSuccess && device < 64) done_devices |= 1ull << device;
    }
    return code;
}

cudaError_t tensor_cores_supports(const trtllm_weight_only_gemm_params& p, int compute_capability) {
    Choice c;
    if (p.tactic > 101 && (compute_capability != 90 || !read_tactic(p.tactic, &c))) {
        return refuse(cudaErrorInvalidValue,
                      "weight_only_gemm has no tactic %d for %lld tokens on compute capability %d.%d: use 0", p.tactic,
                      static_cast<long long>(p.m), compute_capability / 10, compute_capability % 10);
    }
    if (p.m > 65535LL * 64 || p.n > 65535LL * 128) {
        return refuse(cudaErrorInvalidValue, "weight_only_gemm takes up to 4194240 tokens and 8388480 rows, not %lld and %lld",
                      static_cast<long long>(p.m), static_cast<long long>(p.n));
    }
    return cudaSuccess;
}

int64_t tensor_cores_workspace_bytes(const trtllm_weight_only_gemm_params&) { return 0; }

cudaError_t tensor_cores(const trtllm_weight_only_gemm_params& p, cudaStream_t stream) {
    const TensorArguments a = arguments_of(p);
    const int sms = multiprocessors();
    const Choice c = choice_of(p, compute_capability());
    cudaError_t code;
    if (c.kernel == Kernel::kPortable) {
        const int64_t row_bytes =
            tiles_along_k(p.k, p.weight_dtype) * tile_bytes(p.weight_dtype, p.group, p.has_zero != 0);
        code = portable(a, p.x, p.x_stride, p.weight, row_bytes, int(stripes(p.n)), p.weight_dtype,
                        p.dtype == TRTLLM_FLOAT16, stream);
    } else {
        code = hopper(p, a, c, sms, stream);
        if (code == cudaErrorNotSupported) return code;
    }
    return code == cudaSuccess ? launched("weight_only_gemm") : code;
}

}  // namespace trtllm::weight_only
