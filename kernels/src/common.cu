// What the library says of itself, and the sentence of a refused call.
#include <cuda_runtime.h>

#include <cstdio>
#include <cstring>
#include <string>

#include "build_info.h"
#include "registry.hpp"

namespace trtllm {
namespace {

thread_local char sentence[1024];
const Capability* capabilities = nullptr;
const StructSize* sizes = nullptr;
constexpr int kMaxDevices = 64;

int attribute(cudaDeviceAttr which, int (&cache)[kMaxDevices]) {
    int device = 0;
    if (cudaGetDevice(&device) != cudaSuccess || device >= kMaxDevices) return 0;
    // a benign race: every thread writes the same value
    if (cache[device] == 0 && cudaDeviceGetAttribute(&cache[device], which, device) != cudaSuccess) return 0;
    return cache[device];
}

}  // namespace

cudaError_t refuse(cudaError_t code, const char* format, ...) {
    va_list arguments;
    va_start(arguments, format);
    std::vsnprintf(sentence, sizeof sentence, format, arguments);
    va_end(arguments);
    return code;
}

cudaError_t launched(const char* kernel) {
    const cudaError_t code = cudaGetLastError();
    if (code == cudaSuccess) {
        sentence[0] = '\0';
        return code;
    }
    return refuse(code, "%s could not be launched: %s", kernel, cudaGetErrorString(code));
}

int compute_capability() {
    static int major[kMaxDevices], minor[kMaxDevices];
    return 10 * attribute(cudaDevAttrComputeCapabilityMajor, major) +
           attribute(cudaDevAttrComputeCapabilityMinor, minor);
}

int multiprocessors() {
    static int count[kMaxDevices];
    return attribute(cudaDevAttrMultiProcessorCount, count);
}

const char* name_of(trtllm_dtype type) {
    switch (type) {
        case TRTLLM_FLOAT32: return "float32";
        case TRTLLM_FLOAT16: return "float16";
        case TRTLLM_BFLOAT16: return "bfloat16";
        case TRTLLM_INT8: return "int8";
        case TRTLLM_FLOAT8_E4M3: return "float8_e4m3";
        case TRTLLM_INT4: return "int4";
        case TRTLLM_INT32: return "int32";
    }
    return "an unknown type";
}

size_t bytes_of(trtllm_dtype type) {
    switch (type) {
        case TRTLLM_FLOAT32:
        case TRTLLM_INT32: return 4;
        case TRTLLM_FLOAT16:
        case TRTLLM_BFLOAT16: return 2;
        case TRTLLM_INT8:
        case TRTLLM_FLOAT8_E4M3: return 1;
        case TRTLLM_INT4: return 0;
    }
    return 0;
}

Capability::Capability(const char* text) : json(text), next(capabilities) { capabilities = this; }

StructSize::StructSize(const char* c_name, size_t size) : name(c_name), bytes(size), next(sizes) { sizes = this; }

}  // namespace trtllm

extern "C" {

int trtllm_abi(void) { return TRTLLM_KERNELS_ABI; }

const char* trtllm_last_error(void) { return trtllm::sentence; }

const char* trtllm_build_info(void) { return TRTLLM_BUILD_INFO; }

const char* trtllm_capabilities(void) {
    static const std::string all = [] {
        std::string text = "[";
        for (const auto* one = trtllm::capabilities; one != nullptr; one = one->next) {
            if (text.size() > 1) text += ',';
            text += one->json;
        }
        return text + "]";
    }();
    return all.c_str();
}

long trtllm_struct_size(const char* name) {
    for (const auto* one = trtllm::sizes; one != nullptr; one = one->next) {
        if (std::strcmp(one->name, name) == 0) return static_cast<long>(one->bytes);
    }
    return -1;
}

}  // extern "C"
