/* Types every kernel's interface uses, and what the library says of itself. */
#ifndef TRTLLM_KERNELS_COMMON_H
#define TRTLLM_KERNELS_COMMON_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define TRTLLM_KERNELS_ABI 1
#define TRTLLM_API __attribute__((visibility("default")))

/* A cudaStream_t, without the CUDA headers. */
typedef void* trtllm_stream;

typedef enum trtllm_dtype {
    TRTLLM_FLOAT32 = 0,
    TRTLLM_FLOAT16 = 1,
    TRTLLM_BFLOAT16 = 2,
    TRTLLM_INT8 = 3,
    TRTLLM_FLOAT8_E4M3 = 4,
    TRTLLM_INT4 = 5,
    TRTLLM_INT32 = 6
} trtllm_dtype;

/* TRTLLM_KERNELS_ABI of the library that was loaded. */
TRTLLM_API int trtllm_abi(void);

/* Why this thread's last call returned an error: one sentence, empty when it did not. */
TRTLLM_API const char* trtllm_last_error(void);

/* JSON object: toolkit, architectures (as given to the compiler), families. */
TRTLLM_API const char* trtllm_build_info(void);

/* JSON array: one object a kernel with what it supports. See docs/kernels.md. */
TRTLLM_API const char* trtllm_capabilities(void);

/* sizeof of a parameter struct by its C name, -1 for an unknown one: bindings check their mirror against it. */
TRTLLM_API long trtllm_struct_size(const char* name);

#ifdef __cplusplus
}
#endif
#endif
