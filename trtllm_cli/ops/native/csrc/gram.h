// Gram matrices of activations, what GPTQ and AWQ know about a layer's input.
#pragma once
#include <cstdint>

namespace tn {

// hessian [k][k] float32 += x^T x for x [m][k] bfloat16, sums in float32. The matrix must be symmetric and stays so.
// Only builds with bfloat16 products have it (kHasBf16); the result does not depend on `threads`.
void gram(float* hessian, int64_t k, const uint16_t* x, int64_t m, int threads);

}  // namespace tn
