// Matrix-matrix products of many rows: a register tile of rows x (panels of sixteen columns), float32 or bfloat16
// operands, float32 sums.
#pragma once
#include "weights.h"

namespace tn {

#ifdef TN_BF16
constexpr bool kHasBf16 = true;
#else
constexpr bool kHasBf16 = false;
#endif

// c[m][16 * p + lane] (+)= sum over k of a[m][k] * b[p][k][lane], all panels sixteen wide.
// float: a [rows][lda], b panels of stride `bstride` floats, laid out [k][16].
void tile_float(const float* a, int64_t lda, int64_t rows, const float* b, int64_t bstride, int panels, int64_t k,
                float* c, int64_t ldc, bool accumulate);
// bfloat16: k is even and counts elements; b panels are [k/2][16][2], `bstride` counts 16-bit elements.
void tile_bf16(const uint16_t* a, int64_t lda, int64_t rows, const uint16_t* b, int64_t bstride, int panels, int64_t k,
               float* c, int64_t ldc, bool accumulate);

// The panels a thread dequantised last, kept because consecutive tasks often share them.
struct PanelCache {
    Scratch data, plain;
    const Weight* weight = nullptr;
    int64_t first = -1;
};

constexpr int kGemmPanels = 4;  // panels a task: as wide as the register tile

// Rows [m0, m1) and panels [first, first + count) of y = a @ w.T, scaled and with bias. `a` is float32 or bfloat16
// (`bf16`), [rows][lda], zero in the element after an odd k. `scales` of the rows, or null.
void gemm(const Weight& w, bool bf16, const void* a, int64_t lda, const float* scales, int64_t m0, int64_t m1, float* y,
          int64_t ldy, int64_t first, int count, PanelCache& cache);

}  // namespace tn
