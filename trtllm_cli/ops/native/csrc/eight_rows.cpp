#include "eight_rows.h"

#include <algorithm>
#include <limits>

#include "eight.h"
#include "gemv.h"

namespace tn {

namespace {

#ifdef TN_AVX512
constexpr int kRows = 6;  // 6 x 4 accumulators, 4 columns of weights and a broadcast fill 29 of 32 registers
#else
constexpr int kRows = 2;
#endif
constexpr int64_t kDepth = 4096;  // inputs a pass: four panels of this depth stay in the second-level cache

// Integer sums over inputs [k0, k1) are carried in y, bit by bit, until the last pass turns them into floats.
struct Pass {
    int64_t k0, k1;
    bool first, last;
};

template <int ROWS, int PANELS>
void micro(const Weight& w, const Int8Rows& x, int64_t m, float* y, int64_t ldy, int64_t panel, const Pass& pass) {
    // one row: two chains, or each step waits for the one before
    constexpr int chains = ROWS == 1 ? 2 : 1;
    v16i acc[ROWS][PANELS] = {}, more[PANELS] = {};
    const char* column[PANELS];
    for (int p = 0; p < PANELS; ++p) column[p] = w.panel(panel + p);
    const int8_t* row = x.data + m * x.ld;
    const int64_t ahead = prefetch_distance(w, PANELS);
    const auto step = [&](int64_t k, int chain) {
        v16i weight[PANELS];
#pragma GCC unroll 4
        for (int p = 0; p < PANELS; ++p) {
            if (ROWS < 6) prefetch(column[p] + k * kLanes + ahead);
            weight[p] = load_words(column[p] + k * kLanes);
        }
#pragma GCC unroll 6
        for (int r = 0; r < ROWS; ++r) {
            int32_t four;
            std::memcpy(&four, row + r * x.ld + k, 4);
#pragma GCC unroll 4
            for (int p = 0; p < PANELS; ++p) {
                v16i& sum = chain ? more[p] : acc[r][p];
                sum = dot4(sum, weight[p], four);
            }
        }
    };
    int64_t k = pass.k0;
    for (; chains == 2 && k + 4 < pass.k1; k += 8) {
        step(k, 0);
        step(k + 4, 1);
    }
    for (; k < pass.k1; k += 4) step(k, 0);
    for (int p = 0; chains == 2 && p < PANELS; ++p) acc[0][p] += more[p];
    for (int p = 0; p < PANELS; ++p) {
        const int64_t at = (panel + p) * kLanes;
        const int width = (int)std::min<int64_t>(kLanes, w.n - at);
        const v16 scale = load((const float*)w.scale + at), bias = w.bias ? load(w.bias + at) : v16{};
        for (int r = 0; r < ROWS; ++r) {
            float* out = y + (m + r) * ldy + at;
            v16i sum = acc[r][p];
            if (!pass.first) sum += (v16i)load_part(out, width);
            if (!pass.last) {
                store_part(out, (v16)sum, width);
                continue;
            }
            // weights are stored 128 higher than they are
            sum -= 128 * x.sums[m + r];
            store_part(out, fma(__builtin_convertvector(sum, v16) * x.scales[m + r], scale, bias), width);
        }
    }
}

template <int PANELS>
void strip(const Weight& w, const Int8Rows& x, int64_t m0, int64_t m1, float* y, int64_t ldy, int64_t panel,
           const Pass& pass) {
    int64_t m = m0;
    for (; m + kRows <= m1; m += kRows) micro<kRows, PANELS>(w, x, m, y, ldy, panel, pass);
    switch (m1 - m) {
        case 1: return micro<1, PANELS>(w, x, m, y, ldy, panel, pass);
#ifdef TN_AVX512
        case 2: return micro<2, PANELS>(w, x, m, y, ldy, panel, pass);
        case 3: return micro<3, PANELS>(w, x, m, y, ldy, panel, pass);
        case 4: return micro<4, PANELS>(w, x, m, y, ldy, panel, pass);
        case 5: return micro<5, PANELS>(w, x, m, y, ldy, panel, pass);
#endif
        default: return;
    }
}

}  // namespace

float row_scale(const float* x, int64_t dim, float fixed, float top) {
    v16i most{};
    for (int64_t i = 0; i < dim; i += kLanes)
        most = max16i(most, magnitude_bits(load_part(x + i, (int)std::min<int64_t>(kLanes, dim - i))));
    const int32_t bits = max_lanes(most);
    // a fixed scale saturates at infinity, a row's own would divide by it
    if (bits > 0x7f800000 || (bits == 0x7f800000 && !(fixed > 0))) return std::numeric_limits<float>::quiet_NaN();
    if (fixed > 0) return fixed;
    float largest;
    std::memcpy(&largest, &bits, 4);
    return largest > std::numeric_limits<float>::min() * top ? largest / top : 1.0f;
}

void quantize_int8(const float* x, int64_t dim, int64_t padded, float scale, int8_t* out, int32_t& sum) {
    v16i total{};
    for (int64_t i = 0; i < padded; i += kLanes) {
        const int64_t left = dim - i;
        const v16 value = left >= kLanes ? load(x + i) : left > 0 ? load_part(x + i, (int)left) : v16{};
        const v16i whole = round_whole(min16(max16(value / scale, splat(-128.f)), splat(127.f)));
        store_bytes(out + i, whole);
        total += whole;
    }
    sum = sum_lanes(total);
}

void quantize_e4m3(const float* x, int64_t dim, float scale, float* out) {
    for (int64_t i = 0; i < dim; i += kLanes) {
        const int width = (int)std::min<int64_t>(kLanes, dim - i);
        store_part(out + i, round_e4m3(load_part(x + i, width) / scale), width);
    }
}

void product_int8(const Weight& w, const Int8Rows& x, int64_t m0, int64_t m1, float* y, int64_t ldy, int64_t first,
                  int64_t last) {
    for (; first < last; first += kInt8Panels) {
        const int count = (int)std::min<int64_t>(kInt8Panels, last - first);
        for (int64_t k0 = 0; k0 < w.k; k0 += kDepth) {
            const Pass pass{k0, std::min(w.k, k0 + kDepth), k0 == 0, k0 + kDepth >= w.k};
            switch (count) {
                case 1: strip<1>(w, x, m0, m1, y, ldy, first, pass); break;
                case 2: strip<2>(w, x, m0, m1, y, ldy, first, pass); break;
                case 3: strip<3>(w, x, m0, m1, y, ldy, first, pass); break;
                default: strip<4>(w, x, m0, m1, y, ldy, first, pass);
            }
        }
    }
}

}  // namespace tn
