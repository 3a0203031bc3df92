// Host side of every launcher: the refusal sentence, the capability table, launch checks. No device code.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdarg>
#include <cstddef>

#include "trtllm_kernels/common.h"

namespace trtllm {

/// Store the sentence that trtllm_last_error() returns on this thread, and give `code` back.
__attribute__((format(printf, 2, 3))) cudaError_t refuse(cudaError_t code, const char* format, ...);

/// The error of the launch just made, as a sentence with `kernel` in it; cudaSuccess clears the sentence.
cudaError_t launched(const char* kernel);

/// 10 * major + minor of the current device (cached per device), 0 when there is none.
int compute_capability();

/// Number of multiprocessors of the current device (cached per device).
int multiprocessors();

const char* name_of(trtllm_dtype type);
size_t bytes_of(trtllm_dtype type);  // 0 for int4, which has half a byte an element

/// One row of the capability table. `json` is a JSON object with at least "kernel", "family", "min_compute_capability".
struct Capability {
    const char* json;
    explicit Capability(const char* json);  // registers itself; use a namespace-scope static
    const Capability* next;
};

/// Registers sizeof(T) under its C name; use a namespace-scope static in the family's launcher file.
struct StructSize {
    const char* name;
    size_t bytes;
    StructSize(const char* name, size_t bytes);
    const StructSize* next;
};

}  // namespace trtllm
