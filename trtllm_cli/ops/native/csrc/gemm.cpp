#include "gemm.h"

#include <algorithm>

namespace tn {

namespace {

#ifdef TN_AVX512
constexpr int kRows = 6;  // 6 x 4 accumulators, 4 columns of B and a broadcast fill 29 of 32 registers
#else
constexpr int kRows = 2;
#endif

// inputs a pass: a panel block of this depth stays in the second-level cache
constexpr int64_t kDepth = 2048;

// What happens to sums before they are stored.
struct Finish {
    const float* scale = nullptr;  // per column, or none
    const float* rows = nullptr;   // per row, or none
    const float* bias = nullptr;
    int64_t width = INT64_MAX;  // columns that exist
    bool accumulate = false;
};

template <bool BF16>
struct Kind;
template <>
struct Kind<false> {
    typedef float Element;
    static constexpr int kStep = 1;
};
template <>
struct Kind<true> {
    typedef uint16_t Element;
    static constexpr int kStep = 2;
};

template <bool BF16, int ROWS, int PANELS>
void micro(const typename Kind<BF16>::Element* a, int64_t lda, const typename Kind<BF16>::Element* b, int64_t bstride,
           int64_t k, float* c, int64_t ldc, const Finish& finish) {
    v16 acc[ROWS][PANELS] = {};
    if (BF16) {
#ifdef TN_BF16
        for (int64_t i = 0; i < k; i += 2) {
            __m512bh column[PANELS];
#pragma GCC unroll 4
            for (int p = 0; p < PANELS; ++p)
                column[p] = (__m512bh)_mm512_loadu_si512((const uint16_t*)b + p * bstride + i * 16);
#pragma GCC unroll 6
            for (int m = 0; m < ROWS; ++m) {
                int pair;
                std::memcpy(&pair, (const uint16_t*)a + m * lda + i, 4);
                const __m512bh row = (__m512bh)_mm512_set1_epi32(pair);
#pragma GCC unroll 4
                for (int p = 0; p < PANELS; ++p)
                    acc[m][p] = (v16)_mm512_dpbf16_ps((__m512)acc[m][p], row, column[p]);
            }
        }
#endif
    } else {
        for (int64_t i = 0; i < k; ++i) {
            v16 column[PANELS];
#pragma GCC unroll 4
            for (int p = 0; p < PANELS; ++p) column[p] = load((const float*)b + p * bstride + i * 16);
#pragma GCC unroll 6
            for (int m = 0; m < ROWS; ++m) {
                const v16 row = splat(((const float*)a)[m * lda + i]);
#pragma GCC unroll 4
                for (int p = 0; p < PANELS; ++p) acc[m][p] = fma(row, column[p], acc[m][p]);
            }
        }
    }
    for (int p = 0; p < PANELS; ++p) {
        const int64_t left = finish.width - p * kLanes;
        const int width = (int)(left < kLanes ? left : kLanes);
        const v16 scale = finish.scale ? load(finish.scale + p * kLanes) : splat(1.0f);
        const v16 bias = finish.bias ? load(finish.bias + p * kLanes) : v16{};
        for (int m = 0; m < ROWS; ++m) {
            float* at = c + m * ldc + p * kLanes;
            v16 value = acc[m][p];
            const v16 factor = finish.rows ? scale * finish.rows[m] : scale;
            if (width == kLanes) {
                if (finish.accumulate) value += load(at);
                store(at, fma(value, factor, bias));
            } else {
                if (finish.accumulate) value += load_part(at, width);
                store_part(at, fma(value, factor, bias), width);
            }
        }
    }
}

template <bool BF16, int PANELS>
void strip(const typename Kind<BF16>::Element* a, int64_t lda, int64_t rows, const typename Kind<BF16>::Element* b,
           int64_t bstride, int64_t k, float* c, int64_t ldc, Finish finish) {
    int64_t m = 0;
    for (; m + kRows <= rows; m += kRows) {
        micro<BF16, kRows, PANELS>(a + m * lda, lda, b, bstride, k, c + m * ldc, ldc, finish);
        if (finish.rows) finish.rows += kRows;
    }
    a += m * lda;
    c += m * ldc;
    switch (rows - m) {
        case 1: return micro<BF16, 1, PANELS>(a, lda, b, bstride, k, c, ldc, finish);
#ifdef TN_AVX512
        case 2: return micro<BF16, 2, PANELS>(a, lda, b, bstride, k, c, ldc, finish);
        case 3: return micro<BF16, 3, PANELS>(a, lda, b, bstride, k, c, ldc, finish);
        case 4: return micro<BF16, 4, PANELS>(a, lda, b, bstride, k, c, ldc, finish);
        case 5: return micro<BF16, 5, PANELS>(a, lda, b, bstride, k, c, ldc, finish);
#endif
        default: return;
    }
}

template <bool BF16>
void tile(const typename Kind<BF16>::Element* a, int64_t lda, int64_t rows, const typename Kind<BF16>::Element* b,
          int64_t bstride, int panels, int64_t k, float* c, int64_t ldc, Finish finish) {
    while (panels > 0) {
        const int count = panels < kGemmPanels ? panels : kGemmPanels;
        switch (count) {
            case 1: strip<BF16, 1>(a, lda, rows, b, bstride, k, c, ldc, finish); break;
            case 2: strip<BF16, 2>(a, lda, rows, b, bstride, k, c, ldc, finish); break;
            case 3: strip<BF16, 3>(a, lda, rows, b, bstride, k, c, ldc, finish); break;
            default: strip<BF16, 4>(a, lda, rows, b, bstride, k, c, ldc, finish);
        }
        panels -= count;
        b += count * bstride;
        c += count * kLanes;
        if (finish.scale) finish.scale += count * kLanes;
        if (finish.bias) finish.bias += count * kLanes;
        finish.width -= count * kLanes;
    }
}

template <bool BF16>
void product(const Weight& w, const typename Kind<BF16>::Element* a, int64_t lda, const float* scales, int64_t m0,
             int64_t m1, float* y, int64_t ldy, int64_t first, int count, PanelCache& cache) {
    typedef typename Kind<BF16>::Element Element;
    constexpr int64_t step = Kind<BF16>::kStep;
    // a group that is no multiple of eight inputs can only be entered at its start
    const int64_t depth = w.k <= kDepth || (w.format == kInt4 && w.group % 8) ? w.k : kDepth;
    const bool in_place = w.format == (BF16 ? kBfloat16 : kFloat32);
    const int64_t column = first * kLanes;
    Finish finish;
    finish.width = w.n - column;
    for (int64_t k0 = 0; k0 < w.k; k0 += depth) {
        const int64_t k1 = std::min(w.k, k0 + depth), padded = (k1 - k0 + step - 1) / step * step;
        const Element* b;
        int64_t bstride;
        if (in_place) {
            b = (const Element*)w.panel(first) + k0 * 16;
            bstride = w.panel_bytes() / (int64_t)sizeof(Element);
            // the next block, while this one is multiplied; pointless once many rows share each block
            if (m1 - m0 <= 32 && k0 == 0) {
                const char* next = w.panel(first + count);
                for (int64_t at = 0; at < std::min<int64_t>(count * w.panel_bytes(), 262144); at += 64)
                    __builtin_prefetch(next + at, 0, 2);
            }
        } else {
            bstride = padded * 16;
            Element* out = cache.data.get<Element>((size_t)(kGemmPanels * bstride));
            b = out;
            if (cache.weight != &w || cache.first != first || depth < w.k) {
                for (int p = 0; p < count; ++p) {
                    if (BF16) unpack_pairs(w, first + p, k0, k1, (uint16_t*)out + p * bstride, cache.plain);
                    else unpack_float(w, first + p, k0, k1, (float*)out + p * bstride);
                }
                cache.weight = &w;
                cache.first = first;
            }
        }
        finish.accumulate = k0 > 0;
        if (k1 == w.k) {
            finish.scale = w.format == kInt8 || w.format == kE4m3 ? (const float*)w.scale + column : nullptr;
            finish.rows = scales ? scales + m0 : nullptr;
            finish.bias = w.bias ? w.bias + column : nullptr;
        }
        tile<BF16>(a + m0 * lda + k0, lda, m1 - m0, b, bstride, count, padded, y + m0 * ldy + column, ldy, finish);
    }
}

}  // namespace

void tile_float(const float* a, int64_t lda, int64_t rows, const float* b, int64_t bstride, int panels, int64_t k,
                float* c, int64_t ldc, bool accumulate) {
    Finish finish;
    finish.accumulate = accumulate;
    tile<false>(a, lda, rows, b, bstride, panels, k, c, ldc, finish);
}

void tile_bf16(const uint16_t* a, int64_t lda, int64_t rows, const uint16_t* b, int64_t bstride, int panels, int64_t k,
               float* c, int64_t ldc, bool accumulate) {
    Finish finish;
    finish.accumulate = accumulate;
    tile<true>(a, lda, rows, b, bstride, panels, k, c, ldc, finish);
}

void gemm(const Weight& w, bool bf16, const void* a, int64_t lda, const float* scales, int64_t m0, int64_t m1, float* y,
          int64_t ldy, int64_t first, int count, PanelCache& cache) {
    if (bf16) product<true>(w, (const uint16_t*)a, lda, scales, m0, m1, y, ldy, first, count, cache);
    else product<false>(w, (const float*)a, lda, scales, m0, m1, y, ldy, first, count, cache);
}

}  // namespace tn
