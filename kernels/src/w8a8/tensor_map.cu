// Host helpers of the Hopper kernels: tensor maps without a link to libcuda, the limit of shared memory.
#include <cuda.h>
#include <cuda_runtime.h>

#include "registry.hpp"
#include "w8a8_launch.hpp"

namespace trtllm::w8a8 {
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

}  // namespace

cudaError_t tensor_map(CUtensorMap* map, const void* base, int element_bytes, int64_t rows, int64_t columns,
                       int64_t row_stride, int box_rows, int box_columns) {
    static const Encode encode = find_encode();
    if (encode == nullptr) {
        return refuse(cudaErrorNotSupported,
                      "w8a8 needs the driver's cuTensorMapEncodeTiled: update the driver to 12.0");
    }
    const cuuint64_t extents[2] = {cuuint64_t(columns), cuuint64_t(rows)};
    const cuuint64_t strides[1] = {cuuint64_t(row_stride) * element_bytes};
    const cuuint32_t box[2] = {cuuint32_t(box_columns), cuuint32_t(box_rows)};
    const cuuint32_t steps[2] = {1, 1};
    const CUresult result =
        encode(map, element_bytes == 1 ? CU_TENSOR_MAP_DATA_TYPE_UINT8 : CU_TENSOR_MAP_DATA_TYPE_UINT16, 2,
               const_cast<void*>(base), extents, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
               CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    if (result != CUDA_SUCCESS) {
        return refuse(cudaErrorInvalidValue,
                      "w8a8: no tensor map for %lld rows of %lld elements, %lld apart (CUresult %d)",
                      static_cast<long long>(rows), static_cast<long long>(columns), static_cast<long long>(row_stride),
                      int(result));
    }
    return cudaSuccess;
}

cudaError_t allow_shared(const void* kernel, int bytes, unsigned long long& done_devices) {
    int device = 0;
    cudaError_t code = cudaGetDevice(&device);
    // two threads at once set the same limit twice, which is harmless
    if (code == cudaSuccess && (device >= 64 || (done_devices >> device & 1) == 0)) {
        code = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
        if (code == cudaSuccess && device < 64) done_devices |= 1ull << device;
    }
    if (code == cudaSuccess) return code;
    cudaGetLastError();
    return refuse(code, "w8a8 was refused %d bytes of shared memory: %s", bytes, cudaGetErrorString(code));
}

}  // namespace trtllm::w8a8
