// Row-wise operations: normalisation, residual addition, gated activation. All sums in float32.
#pragma once
#include "simd.h"

namespace tn {

enum Activation { kSilu = 0, kGelu = 1, kGeluTanh = 2 };

// out = x / sqrt(mean(x^2) + eps) * weight over `dim` elements; x and out may be the same. `weight` is readable up to a
// multiple of sixteen.
void rms_norm(const float* x, const float* weight, float eps, int64_t dim, float* out);
// total = residual + delta (total may be null or either input), out = norm(total). out may not alias the inputs.
void add_rms_norm(const float* residual, const float* delta, float* total, const float* weight, float eps, int64_t dim,
                  float* out);
// out = activation(gate) * up; out may be either input.
void gated(const float* gate, const float* up, int kind, int64_t dim, float* out);
// float32 -> bfloat16, zero up to `padded`.
void round_row(const float* x, int64_t dim, int64_t padded, uint16_t* out);

}  // namespace tn
