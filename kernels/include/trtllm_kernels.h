/* The C interface of libtrtllm_kernels.so: plain pointers, sizes and a stream, no framework and no C++ in it.
 *
 * Every launcher has the form
 *
 *     int trtllm_<kernel>(const trtllm_<kernel>_params* params, trtllm_stream stream);
 *     int trtllm_<kernel>_supports(const trtllm_<kernel>_params* params, int compute_capability);
 *
 * and returns a cudaError_t (0: the work is queued on the stream, or is supported). Otherwise trtllm_last_error() is one
 * sentence that names the shape, the type and the compute capability at fault and what to use instead. `supports` takes
 * the capability as 10 * major + minor, looks at no pointer and needs no GPU. Nothing allocates, nothing synchronizes:
 * all launchers may be captured into a CUDA graph. Where a kernel wants scratch memory,
 * trtllm_<kernel>_workspace_bytes(params) says how much.
 */
#ifndef TRTLLM_KERNELS_H
#define TRTLLM_KERNELS_H

#include "trtllm_kernels/common.h"
#include "trtllm_kernels/families.h"

#endif
