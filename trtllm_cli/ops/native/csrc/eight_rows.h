// Activations in eight bits, and products of int8 activations with int8 weights in exact integer sums.
#pragma once
#include "weights.h"

namespace tn {

enum ActivationType { kNoActivation = 0, kInt8Activation = 1, kE4m3Activation = 2 };

// The scale of a row for a type whose largest value is `top`: `fixed` where that is positive, else max|x| / top, 1 for
// a row of (nearly) zeros; NaN for a row that is not finite, so that its products are.
float row_scale(const float* x, int64_t dim, float fixed, float top);

// x [dim] -> round(x / scale), ties to even, in -128..127, zeros up to `padded`; `sum` is that of the whole numbers.
void quantize_int8(const float* x, int64_t dim, int64_t padded, float scale, int8_t* out, int32_t& sum);
// x [dim] -> the E4M3 values nearest x / scale, as floats; x and out may be the same.
void quantize_e4m3(const float* x, int64_t dim, float scale, float* out);

// Rows of quantized activations: int8 [rows][ld], and of each row its scale and the sum of its whole numbers.
struct Int8Rows {
    const int8_t* data;
    int64_t ld;
    const float* scales;
    const int32_t* sums;
};

constexpr int kInt8Panels = 4;  // panels a task: as wide as the register tile

// Rows [m0, m1) and panels [first, last) of y = (integer sums) * row scale * weight scale + bias, for a kInt8Dot weight.
void product_int8(const Weight& w, const Int8Rows& x, int64_t m0, int64_t m1, float* y, int64_t ldy, int64_t first,
                  int64_t last);

}  // namespace tn
