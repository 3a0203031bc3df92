// int4 products of a few rows in bfloat16 dot products. A dword holds the nibbles of inputs 8i .. 8i+7 of one output:
// shifted by 4j, its two halves end in the nibbles of inputs j and j + 4, and one table look-up turns both into
// bfloat16. The activations are paired the same way, once for their leading and once for their trailing eight bits.
#include "gemv.h"

namespace tn {

#ifdef TN_BF16

namespace {

template <int ROWS, int PANELS>
void block(const Weight& w, const uint32_t* x, const float* sums, float* y, int64_t ldy, int64_t first) {
    const int64_t groups = w.groups(), words = w.words();
    // the look-up uses five bits of its index, one of them the neighbour's: the table repeats after sixteen
    const __m512i table = _mm512_set_epi16(
        0x40e0, 0x40c0, 0x40a0, 0x4080, 0x4040, 0x4000, 0x3f80, 0x0000, (short)0xbf80, (short)0xc000, (short)0xc040,
        (short)0xc080, (short)0xc0a0, (short)0xc0c0, (short)0xc0e0, (short)0xc100, 0x40e0, 0x40c0, 0x40a0, 0x4080,
        0x4040, 0x4000, 0x3f80, 0x0000, (short)0xbf80, (short)0xc000, (short)0xc040, (short)0xc080, (short)0xc0a0,
        (short)0xc0c0, (short)0xc0e0, (short)0xc100);
    v16 total[PANELS][ROWS] = {};
    const char* panel[PANELS];
    for (int p = 0; p < PANELS; ++p) panel[p] = w.panel(first + p);
    const int64_t ahead = prefetch_distance(w, PANELS);
    const char* scales = (const char*)w.scale;
    const int64_t scale_bytes = w.half_scale ? 32 : 64;
    for (int64_t g = 0; g < groups; ++g) {
        __m512 acc[PANELS][ROWS][2];
#pragma GCC unroll 8
        for (int p = 0; p < PANELS; ++p)
            for (int m = 0; m < ROWS; ++m) acc[p][m][0] = acc[p][m][1] = _mm512_setzero_ps();
        for (int64_t i = g * words; i < (g + 1) * words; ++i) {
            const uint32_t* xi = x + i * 8;
#pragma GCC unroll 8
            for (int p = 0; p < PANELS; ++p) {
                prefetch(panel[p] + i * 64 + ahead);
                const __m512i packed = _mm512_loadu_si512(panel[p] + i * 64);
#pragma GCC unroll 4
                for (int j = 0; j < 4; ++j) {
                    const __m512bh a = (__m512bh)_mm512_permutexvar_epi16(_mm512_srli_epi32(packed, 4 * j), table);
#pragma GCC unroll 8
                    for (int m = 0; m < ROWS; ++m) {
                        const uint32_t* row = xi + m * w.k;
                        acc[p][m][0] =
                            _mm512_dpbf16_ps(acc[p][m][0], a, (__m512bh)_mm512_set1_epi32((int)row[j]));
                        acc[p][m][1] =
                            _mm512_dpbf16_ps(acc[p][m][1], a, (__m512bh)_mm512_set1_epi32((int)row[4 + j]));
                    }
                }
            }
        }
#pragma GCC unroll 8
        for (int p = 0; p < PANELS; ++p) {
            const v16 scale = w.int4_scale(first + p, g);
            prefetch(scales + ((first + p + PANELS) * groups + g) * scale_bytes);
            if (w.zero) {
                const v16 offset = w.int4_offset(first + p, g);
                for (int m = 0; m < ROWS; ++m)
                    acc[p][m][0] = (__m512)fma(offset, splat(-sums[m * groups + g]), (v16)acc[p][m][0]);
            }
            for (int m = 0; m < ROWS; ++m)
                total[p][m] = fma((v16)acc[p][m][0] + (v16)acc[p][m][1], scale, total[p][m]);
        }
    }
    for (int p = 0; p < PANELS; ++p) {
        const int64_t column = (first + p) * kLanes;
        const int width = (int)(w.n - column < kLanes ? w.n - column : kLanes);
        const v16 bias = w.bias ? load(w.bias + column) : v16{};
        for (int m = 0; m < ROWS; ++m) store_part(y + m * ldy + column, total[p][m] + bias, width);
    }
}

template <int ROWS>
void run(const Weight& w, const uint32_t* x, const float* sums, float* y, int64_t ldy, int64_t first, int64_t last) {
    constexpr int wide = ROWS == 1 ? 4 : ROWS <= 3 ? 2 : 1;
    for (; first + wide <= last; first += wide) block<ROWS, wide>(w, x, sums, y, ldy, first);
    for (; first < last; ++first) block<ROWS, 1>(w, x, sums, y, ldy, first);
}

}  // namespace

bool can_split(const Weight& w) { return w.format == kInt4 && w.group % 8 == 0; }

void split(const float* x, int64_t ldx, int rows, int64_t k, uint32_t* out) {
    // of sixteen leading and sixteen trailing halves: pairs (0, 4) (1, 5) (2, 6) (3, 7) of each eight inputs
    const __m512i order = _mm512_set_epi16(31, 27, 30, 26, 29, 25, 28, 24, 15, 11, 14, 10, 13, 9, 12, 8, 23, 19, 22, 18,
                                           21, 17, 20, 16, 7, 3, 6, 2, 5, 1, 4, 0);
    for (int m = 0; m < rows; ++m) {
        for (int64_t i = 0; i < k; i += kLanes) {
            const int count = (int)(k - i < kLanes ? k - i : kLanes);
            const v16 value = load_part(x + m * ldx + i, count);
            const __m256i high = (__m256i)_mm512_cvtneps_pbh((__m512)value);
            const v16 rest = value - (v16)_mm512_slli_epi32(_mm512_cvtepu16_epi32(high), 16);
            const __m256i low = (__m256i)_mm512_cvtneps_pbh((__m512)rest);
            const __m512i both = _mm512_inserti64x4(_mm512_castsi256_si512(high), low, 1);
            _mm512_mask_storeu_epi32(out + m * k + i, (__mmask16)((1u << count) - 1),
                                     _mm512_permutexvar_epi16(order, both));
        }
    }
}

void gemv_split(const Weight& w, const uint32_t* x, int rows, const float* sums, float* y, int64_t ldy, int64_t first,
                int64_t last) {
    switch (rows) {
        case 1: return run<1>(w, x, sums, y, ldy, first, last);
        case 2: return run<2>(w, x, sums, y, ldy, first, last);
        case 3: return run<3>(w, x, sums, y, ldy, first, last);
        case 4: return run<4>(w, x, sums, y, ldy, first, last);
        case 5: return run<5>(w, x, sums, y, ldy, first, last);
        case 6: return run<6>(w, x, sums, y, ldy, first, last);
        case 7: return run<7>(w, x, sums, y, ldy, first, last);
        default: return run<8>(w, x, sums, y, ldy, first, last);
    }
}

#else

bool can_split(const Weight&) { return false; }
void split(const float*, int64_t, int, int64_t, uint32_t*) {}
void gemv_split(const Weight&, const uint32_t*, int, const float*, float*, int64_t, int64_t, int64_t) {}

#endif

}  // namespace tn
