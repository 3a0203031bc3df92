// Products of a few rows, bound by reading the weights.
#pragma once
#include "weights.h"

namespace tn {

constexpr int kGemvRows = 8;  // the most rows these kernels take

// y[m][16 * p + lane] for panels [first, last): float32 activations x [rows][k] (row stride ldx) times dequantised
// weights. `sums` [rows][groups] holds the sums of x over each group of an int4 weight with zero points; `scales` those of
// the rows of an E4M3 weight, or null. Columns beyond n are not written. Not for kInt8Dot.
void gemv(const Weight& w, const float* x, int64_t ldx, int rows, const float* sums, const float* scales, float* y,
          int64_t ldy, int64_t first, int64_t last);
void group_sums(const Weight& w, const float* x, int64_t ldx, int rows, float* sums);

// The same for int4 in bfloat16 dot products: each activation is the sum of two bfloat16 numbers (16 bits of mantissa),
// the weights are exact small integers. About twice as fast as float32 multiply-adds. `can_split` says whether this
// build and this weight can; `split` prepares `rows` rows of k activations as [rows][k] 32-bit words.
bool can_split(const Weight& w);
void split(const float* x, int64_t ldx, int rows, int64_t k, uint32_t* out);
void gemv_split(const Weight& w, const uint32_t* x, int rows, const float* sums, float* y, int64_t ldy, int64_t first,
                int64_t last);

// Hardware prefetchers stop at the end of a page and start slowly on several short streams: fetch the same place of the
// next block of panels, or further down the panel where a block is too large for the second-level cache.
static TN_INLINE int64_t prefetch_distance(const Weight& w, int panels) {
    const int64_t block = panels * w.panel_bytes();
    return block <= 131072 ? block : 4096;
}
static TN_INLINE void prefetch(const void* at) { __builtin_prefetch(at, 0, 2); }

}  // namespace tn
