// Products of a few rows: every weight is read once, dequantised in registers and multiplied into up to eight rows of
// float32 activations. Each output is two chains (even and odd k) whatever the number of rows, so a sequence's result
// does not depend on how many others are decoded with it.
#include "gemv.h"

#include "eight.h"

namespace tn {

namespace {

// sixteen weights at input k of a panel
template <int F>
TN_INLINE v16 weight_at(const char* panel, int64_t k) {
    if (F == kFloat32) return load((const float*)panel + k * 16);
    if (F == kFloat16) return load_halves((const uint16_t*)panel + k * 16);
    return load_bytes((const int8_t*)panel + k * 16);
}

template <int F, int ROWS, int PANELS>
void plain(const Weight& w, const float* x, int64_t ldx, const float* scales, float* y, int64_t ldy, int64_t first) {
    v16 acc[PANELS][ROWS][2] = {};
    const char* panel[PANELS];
    for (int p = 0; p < PANELS; ++p) panel[p] = w.panel(first + p);
    const int64_t ahead = prefetch_distance(w, PANELS);
    if (F == kBfloat16 || F == kE4m3) {
        constexpr int64_t step = F == kE4m3 ? 32 : 64;
        const auto pair_at = [&](int p, int64_t i, v16& even, v16& odd) {
            if (F == kE4m3) {
                load_e4m3_pairs(panel[p] + i * step, even, odd);
                return;
            }
            const v16u both = (v16u)load_words(panel[p] + i * step);
            even = (v16)(both << 16);
            odd = (v16)(both & 0xffff0000u);
        };
        for (int64_t i = 0; i < w.k / 2; ++i) {
            for (int p = 0; p < PANELS; ++p) {
                prefetch(panel[p] + i * step + ahead);
                v16 even, odd;
                pair_at(p, i, even, odd);
                for (int m = 0; m < ROWS; ++m) {
                    acc[p][m][0] = fma(even, splat(x[m * ldx + 2 * i]), acc[p][m][0]);
                    acc[p][m][1] = fma(odd, splat(x[m * ldx + 2 * i + 1]), acc[p][m][1]);
                }
            }
        }
        if (w.k % 2) {
            for (int p = 0; p < PANELS; ++p) {
                v16 even, odd;
                pair_at(p, w.k / 2, even, odd);
                for (int m = 0; m < ROWS; ++m) acc[p][m][0] = fma(even, splat(x[m * ldx + w.k - 1]), acc[p][m][0]);
            }
        }
    } else {
        constexpr int64_t step = F == kInt8 ? 16 : F == kFloat16 ? 32 : 64;
        constexpr int lines = step * 4 / 64;
        int64_t k = 0;
        for (; k + 4 <= w.k; k += 4) {
            for (int p = 0; p < PANELS; ++p) {
                for (int line = 0; line < lines; ++line) prefetch(panel[p] + k * step + line * 64 + ahead);
                for (int j = 0; j < 4; ++j) {
                    const v16 a = weight_at<F>(panel[p], k + j);
                    for (int m = 0; m < ROWS; ++m)
                        acc[p][m][j & 1] = fma(a, splat(x[m * ldx + k + j]), acc[p][m][j & 1]);
                }
            }
        }
        for (; k < w.k; ++k) {
            for (int p = 0; p < PANELS; ++p) {
                const v16 a = weight_at<F>(panel[p], k);
                for (int m = 0; m < ROWS; ++m) acc[p][m][k & 1] = fma(a, splat(x[m * ldx + k]), acc[p][m][k & 1]);
            }
        }
    }
    for (int p = 0; p < PANELS; ++p) {
        const int64_t column = (first + p) * kLanes;
        const int width = (int)(w.n - column < kLanes ? w.n - column : kLanes);
        const bool scaled = F == kInt8 || F == kE4m3;
        v16 scale = scaled ? load((const float*)w.scale + column) : splat(1.0f);
        if (F == kE4m3) scale *= kE4m3Unit;
        const v16 bias = w.bias ? load(w.bias + column) : v16{};
        for (int m = 0; m < ROWS; ++m) {
            const v16 sum = acc[p][m][0] + acc[p][m][1];
            const v16 factor = F == kE4m3 && scales ? scale * scales[m] : scale;
            const v16 value = scaled ? fma(sum, factor, bias) : sum + bias;
            if (width == kLanes) store(y + m * ldy + column, value);
            else store_part(y + m * ldy + column, value, width);
        }
    }
}

#ifdef TN_AVX512
typedef __m512 Levels;
TN_INLINE Levels levels() { return _mm512_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7); }
// the table look-up uses only the lowest four bits of its index, so the nibble needs no mask
TN_INLINE v16 nibble(v16i words, int j, Levels table) {
    return (v16)_mm512_permutexvar_ps(_mm512_srli_epi32((__m512i)words, 4 * j), table);
}
#else
struct Levels {};
TN_INLINE Levels levels() { return {}; }
TN_INLINE v16 nibble(v16i words, int j, Levels) {
    return __builtin_convertvector((v16i)(((v16u)words >> (4 * j)) & 15u) - 8, v16);
}
#endif

template <int ROWS, int PANELS>
void int4(const Weight& w, const float* x, int64_t ldx, const float* sums, float* y, int64_t ldy, int64_t first) {
    const int64_t groups = w.groups(), words = w.words(), full = w.group / 8;
    const int tail = (int)(w.group % 8);
    const Levels table = levels();
    v16 total[PANELS][ROWS] = {};
    const char* panel[PANELS];
    for (int p = 0; p < PANELS; ++p) panel[p] = w.panel(first + p);
    const int64_t ahead = prefetch_distance(w, PANELS);
    for (int64_t g = 0; g < groups; ++g) {
        v16 acc[PANELS][ROWS][2] = {};
        const float* xg = x + g * w.group;
        for (int64_t i = 0; i < full; ++i) {
            for (int p = 0; p < PANELS; ++p) {
                const char* at = panel[p] + (g * words + i) * 64;
                prefetch(at + ahead);
                const v16i packed = load_words(at);
#pragma GCC unroll 8
                for (int j = 0; j < 8; ++j) {
                    const v16 a = nibble(packed, j, table);
                    for (int m = 0; m < ROWS; ++m)
                        acc[p][m][j & 1] = fma(a, splat(xg[m * ldx + i * 8 + j]), acc[p][m][j & 1]);
                }
            }
        }
        if (tail) {
            for (int p = 0; p < PANELS; ++p) {
                v16i packed = load_words(panel[p] + (g * words + full) * 64);
                for (int j = 0; j < tail; ++j) {
                    const v16 a = nibble(packed, 0, table);
                    packed = (v16i)((v16u)packed >> 4);
                    for (int m = 0; m < ROWS; ++m)
                        acc[p][m][j & 1] = fma(a, splat(xg[m * ldx + full * 8 + j]), acc[p][m][j & 1]);
                }
            }
        }
        for (int p = 0; p < PANELS; ++p) {
            const v16 scale = w.int4_scale(first + p, g);
            if (w.zero) {
                const v16 offset = w.int4_offset(first + p, g);
                for (int m = 0; m < ROWS; ++m)
                    acc[p][m][0] = fma(offset, splat(-sums[m * groups + g]), acc[p][m][0]);
            }
            for (int m = 0; m < ROWS; ++m) total[p][m] = fma(acc[p][m][0] + acc[p][m][1], scale, total[p][m]);
        }
    }
    for (int p = 0; p < PANELS; ++p) {
        const int64_t column = (first + p) * kLanes;
        const int width = (int)(w.n - column < kLanes ? w.n - column : kLanes);
        const v16 bias = w.bias ? load(w.bias + column) : v16{};
        for (int m = 0; m < ROWS; ++m) {
            if (width == kLanes) store(y + m * ldy + column, total[p][m] + bias);
            else store_part(y + m * ldy + column, total[p][m] + bias, width);
        }
    }
}

template <int F, int ROWS, int PANELS>
TN_INLINE void block(const Weight& w, const float* x, int64_t ldx, const float* sums,
                     const float* scales, float* y, int64_t ldy, int64_t first) {
    if (F == kInt4) int4<ROWS, PANELS>(w, x, ldx, sums, y, ldy, first);
    else plain<F, ROWS, PANELS>(w, x, ldx, scales, y, ldy, first);
}

template <int F, int ROWS>
void run(const Weight& w, const float* x, int64_t ldx, const float* sums, const float* scales, float* y,
         int64_t ldy, int64_t first, int64_t last) {
    // enough independent chains to hide the latency of the multiply-add, few enough to stay in registers
    constexpr int wide = ROWS == 1 ? 4 : ROWS <= 3 ? 2 : 1;
    for (; first + wide <= last; first += wide) block<F, ROWS, wide>(w, x, ldx, sums, scales, y, ldy, first);
    for (; first < last; ++first) block<F, ROWS, 1>(w, x, ldx, sums, scales, y, ldy, first);
}

template <int F>
void rows_of(const Weight& w, const float* x, int64_t ldx, int rows, const float* sums, const float* scales, float* y,
             int64_t ldy, int64_t first, int64_t last) {
    switch (rows) {
        case 1: return run<F, 1>(w, x, ldx, sums, scales, y, ldy, first, last);
        case 2: return run<F, 2>(w, x, ldx, sums, scales, y, ldy, first, last);
        case 3: return run<F, 3>(w, x, ldx, sums, scales, y, ldy, first, last);
        case 4: return run<F, 4>(w, x, ldx, sums, scales, y, ldy, first, last);
        case 5: return run<F, 5>(w, x, ldx, sums, scales, y, ldy, first, last);
        case 6: return run<F, 6>(w, x, ldx, sums, scales, y, ldy, first, last);
        case 7: return run<F, 7>(w, x, ldx, sums, scales, y, ldy, first, last);
        default: return run<F, 8>(w, x, ldx, sums, scales, y, ldy, first, last);
    }
}

}  // namespace

void gemv(const Weight& w, const float* x, int64_t ldx, int rows, const float* sums, const float* scales, float* y,
          int64_t ldy, int64_t first, int64_t last) {
    switch (w.format) {
        case kFloat32: return rows_of<kFloat32>(w, x, ldx, rows, sums, scales, y, ldy, first, last);
        case kBfloat16: return rows_of<kBfloat16>(w, x, ldx, rows, sums, scales, y, ldy, first, last);
        case kFloat16: return rows_of<kFloat16>(w, x, ldx, rows, sums, scales, y, ldy, first, last);
        case kE4m3: return rows_of<kE4m3>(w, x, ldx, rows, sums, scales, y, ldy, first, last);
        case kInt8: return rows_of<kInt8>(w, x, ldx, rows, sums, scales, y, ldy, first, last);
        default: return rows_of<kInt4>(w, x, ldx, rows, sums, scales, y, ldy, first, last);
    }
}

void group_sums(const Weight& w, const float* x, int64_t ldx, int rows, float* sums) {
    const int64_t groups = w.groups();
    for (int m = 0; m < rows; ++m) {
        for (int64_t g = 0; g < groups; ++g) {
            const float* at = x + m * ldx + g * w.group;
            v16 acc{};
            int64_t k = 0;
            for (; k + kLanes <= w.group; k += kLanes) acc += load(at + k);
            if (k < w.group) acc += load_part(at + k, (int)(w.group - k));
            sums[m * groups + g] = sum_lanes(acc);
        }
    }
}

}  // namespace tn
