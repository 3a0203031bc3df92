#include "small.h"

namespace tn {

namespace {

void normalise(const float* x, v16 squares, const float* weight, float eps, int64_t dim, float* out) {
    const float factor = 1.0f / std::sqrt(sum_lanes(squares) / (float)dim + eps);
    int64_t i = 0;
    for (; i + kLanes <= dim; i += kLanes) store(out + i, load(x + i) * factor * load(weight + i));
    if (i < dim) store_part(out + i, load_part(x + i, (int)(dim - i)) * factor * load(weight + i), (int)(dim - i));
}

template <int KIND>
TN_INLINE v16 activate(v16 x) {
    if (KIND == kSilu) return x * sigmoid16(x);
    if (KIND == kGelu) return 0.5f * x * (1.0f + erf16(x * 0.70710678118654752f));
    // tanh form, with 1 + tanh(u) = 2 sigmoid(2u)
    const v16 u = 0.79788456080286536f * (x + 0.044715f * x * x * x);
    return x * sigmoid16(2.0f * u);
}

template <int KIND>
void gated_row(const float* gate, const float* up, int64_t dim, float* out) {
    int64_t i = 0;
    for (; i + kLanes <= dim; i += kLanes) store(out + i, activate<KIND>(load(gate + i)) * load(up + i));
    const int left = (int)(dim - i);
    if (left) store_part(out + i, activate<KIND>(load_part(gate + i, left)) * load_part(up + i, left), left);
}

}  // namespace

void rms_norm(const float* x, const float* weight, float eps, int64_t dim, float* out) {
    v16 even{}, odd{};
    int64_t i = 0;
    for (; i + 2 * kLanes <= dim; i += 2 * kLanes) {
        const v16 a = load(x + i), b = load(x + i + kLanes);
        even = fma(a, a, even);
        odd = fma(b, b, odd);
    }
    for (; i < dim; i += kLanes) {
        const v16 a = load_part(x + i, (int)(dim - i < kLanes ? dim - i : kLanes));
        even = fma(a, a, even);
    }
    normalise(x, even + odd, weight, eps, dim, out);
}

void add_rms_norm(const float* residual, const float* delta, float* total, const float* weight, float eps, int64_t dim,
                  float* out) {
    v16 even{}, odd{};
    int64_t i = 0;
    for (; i + 2 * kLanes <= dim; i += 2 * kLanes) {
        const v16 a = load(residual + i) + load(delta + i);
        const v16 b = load(residual + i + kLanes) + load(delta + i + kLanes);
        store(out + i, a);
        store(out + i + kLanes, b);
        even = fma(a, a, even);
        odd = fma(b, b, odd);
    }
    for (; i < dim; i += kLanes) {
        const int width = (int)(dim - i < kLanes ? dim - i : kLanes);
        const v16 a = load_part(residual + i, width) + load_part(delta + i, width);
        store_part(out + i, a, width);
        even = fma(a, a, even);
    }
    if (total) std::memcpy(total, out, sizeof(float) * (size_t)dim);
    normalise(out, even + odd, weight, eps, dim, out);
}

void gated(const float* gate, const float* up, int kind, int64_t dim, float* out) {
    if (kind == kSilu) gated_row<kSilu>(gate, up, dim, out);
    else if (kind == kGelu) gated_row<kGelu>(gate, up, dim, out);
    else gated_row<kGeluTanh>(gate, up, dim, out);
}

void round_row(const float* x, int64_t dim, int64_t padded, uint16_t* out) {
    int64_t i = 0;
    for (; i + kLanes <= dim; i += kLanes) store_bf16(out + i, load(x + i));
    for (; i < dim; ++i) out[i] = float_to_bf16(x[i]);
    for (; i < padded; ++i) out[i] = 0;
}

}  // namespace tn
