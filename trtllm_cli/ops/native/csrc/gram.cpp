// x^T x in bfloat16 dot products. Tokens are taken in blocks; of each block, sixteen channels become a panel of token
// pairs [m/2][16][2], which serves both sides of the product: as a vector of sixteen columns and, one pair at a time,
// as a row. Only panels on and above the diagonal are multiplied; the rest is mirrored at the end.
#include "gram.h"

#include <algorithm>

#include "gemm.h"
#include "pool.h"

namespace tn {

#ifdef TN_BF16

namespace {

constexpr int kTall = 8, kWide = 3;       // 8 x 3 accumulators, 3 columns and a broadcast: 28 of 32 registers
constexpr int64_t kTokens = 1024;         // of a block: kWide panels of it stay in the second-level cache
constexpr int64_t kTaskPanels = 6;        // row panels a task
constexpr int64_t kTile = 32;             // of the mirroring copy

void pack(const uint16_t* x, int64_t ldx, int64_t tokens, int width, uint16_t* out) {
    const __mmask16 mask = (__mmask16)((1u << width) - 1);
    const auto row = [&](int64_t t) {
        return t < tokens ? _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, x + t * ldx)) : _mm512_setzero_si512();
    };
    for (int64_t t = 0; t < tokens; t += 2)
        _mm512_storeu_si512(out + t * kLanes, _mm512_or_si512(row(t), _mm512_slli_epi32(row(t + 1), 16)));
}

// c[r][p * 16 + lane] += sum over token pairs of a[pair][r] . b[p][pair][lane]; `rows` and `columns` exist.
template <int PANELS>
void tile(const uint16_t* a, const uint16_t* b, int64_t stride, int64_t pairs, float* c, int64_t ldc, int rows,
          int64_t columns) {
    __m512 acc[kTall][PANELS];
#pragma GCC unroll 8
    for (int r = 0; r < kTall; ++r)
        for (int p = 0; p < PANELS; ++p) acc[r][p] = _mm512_setzero_ps();
    for (int64_t i = 0; i < pairs; ++i) {
        __m512bh column[PANELS];
#pragma GCC unroll 3
        for (int p = 0; p < PANELS; ++p) column[p] = (__m512bh)_mm512_loadu_si512(b + p * stride + i * 32);
#pragma GCC unroll 8
        for (int r = 0; r < kTall; ++r) {
            int pair;
            std::memcpy(&pair, a + i * 32 + r * 2, 4);
            const __m512bh row = (__m512bh)_mm512_set1_epi32(pair);
#pragma GCC unroll 3
            for (int p = 0; p < PANELS; ++p) acc[r][p] = _mm512_dpbf16_ps(acc[r][p], row, column[p]);
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < kTall; ++r) {
        if (r >= rows) break;
        for (int p = 0; p < PANELS; ++p) {
            const int width = (int)std::min<int64_t>(kLanes, columns - p * kLanes);
            float* at = c + r * ldc + p * kLanes;
            store_part(at, load_part(at, width) + (v16)acc[r][p], width);
        }
    }
}

}  // namespace

void gram(float* hessian, int64_t k, const uint16_t* x, int64_t m, int threads) {
    const int64_t panels = (k + kLanes - 1) / kLanes;
    const int64_t stride = std::min(kTokens, (m + 1) / 2 * 2) * kLanes;
    Pages packed((size_t)(panels * stride) * sizeof(uint16_t));
    uint16_t* const base = (uint16_t*)packed.data();
    struct Task {
        int64_t row, column;
    };
    std::vector<Task> tasks;
    for (int64_t column = 0; column < panels; column += kWide)
        for (int64_t row = 0; row < std::min(panels, column + kWide); row += kTaskPanels) tasks.push_back({row, column});
    Pool pool(threads);
    const std::function<void(Worker&)> body = [&](Worker& worker) {
        for (int64_t from = 0; from < m; from += kTokens) {
            const int64_t tokens = std::min(kTokens, m - from), pairs = (tokens + 1) / 2;
            worker.share(panels, 4, [&](int64_t first, int64_t last) {
                for (int64_t p = first; p < last; ++p)
                    pack(x + from * k + p * kLanes, k, tokens, (int)std::min<int64_t>(kLanes, k - p * kLanes),
                         base + p * stride);
            });
            worker.barrier();
            worker.share((int64_t)tasks.size(), 1, [&](int64_t index, int64_t) {
                const Task& task = tasks[(size_t)index];
                const int count = (int)std::min<int64_t>(kWide, panels - task.column);
                const int64_t columns = k - task.column * kLanes;
                const int64_t end = std::min(std::min(panels, task.row + kTaskPanels), task.column + count);
                const uint16_t* b = base + task.column * stride;
                for (int64_t first = task.row * kLanes; first < std::min(k, end * kLanes); first += kTall) {
                    const uint16_t* a = base + first / kLanes * stride + first % kLanes * 2;
                    float* c = hessian + first * k + task.column * kLanes;
                    const int rows = (int)std::min<int64_t>(kTall, k - first);
                    if (count == 3) tile<3>(a, b, stride, pairs, c, k, rows, columns);
                    else if (count == 2) tile<2>(a, b, stride, pairs, c, k, rows, columns);
                    else tile<1>(a, b, stride, pairs, c, k, rows, columns);
                }
            });
            worker.barrier();
        }
        const int64_t blocks = (k + kTile - 1) / kTile;
        worker.share(blocks, 1, [&](int64_t block, int64_t) {
            const int64_t r0 = block * kTile, r1 = std::min(k, r0 + kTile);
            for (int64_t c0 = r0; c0 < k; c0 += kTile)
                for (int64_t c = c0; c < std::min(k, c0 + kTile); ++c)
                    for (int64_t r = r0; r < std::min(r1, c); ++r) hessian[c * k + r] = hessian[r * k + c];
        });
        worker.barrier();
    };
    pool.run(body);
}

#else

void gram(float*, int64_t, const uint16_t*, int64_t, int) {}

#endif

}  // namespace tn
