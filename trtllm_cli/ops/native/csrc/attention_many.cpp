// Attention of many queries at once (prefill): blocks of queries x blocks of cache positions, softmax carried along
// (FlashAttention, Dao et al., 2022), the query heads that share a key head stacked into one tall matrix.
#include <algorithm>

#include "attention.h"
#include "cached.h"

namespace tn {

namespace {

constexpr float kNone = -1e30f;

template <class T>
TN_INLINE v16 stored(const T* p) {
    return Stored<T>::get(p);
}

// Sixteen-lane panels of a block of the cache as operands: keys are [D][16] a panel already, values become
// [positions][16] a panel of sixteen elements.
template <class T>
const float* key_operand(const T* keys, int64_t width, int64_t panels, float* out) {
    if (sizeof(T) == 4) return (const float*)keys;
    for (int64_t i = 0; i < panels * width; ++i) store(out + i * kLanes, stored(keys + i * kLanes));
    return out;
}
template <class T>
const uint16_t* key_operand(const T* keys, int64_t width, int64_t panels, uint16_t* out) {
    for (int64_t i = 0; i < panels * width; i += 2)
        store_pairs(out + i * kLanes, stored(keys + i * kLanes), stored(keys + (i + 1) * kLanes));
    return out;
}
template <class T>
void value_operand(const T* values, int64_t width, int64_t count, float* out) {
    for (int64_t j = 0; j < count; ++j)
        for (int64_t d = 0; d < width; d += kLanes)
            store(out + (d * kBlock + j * kLanes), stored(values + j * width + d));
}
template <class T>
void value_operand(const T* values, int64_t width, int64_t count, uint16_t* out) {
    for (int64_t j = 0; j < count; j += 2) {
        const T* row = values + j * width;
        for (int64_t d = 0; d < width; d += kLanes) {
            const v16 odd = j + 1 < count ? stored(row + width + d) : v16{};
            store_pairs(out + (d * kBlock + j * kLanes), stored(row + d), odd);
        }
    }
}

TN_INLINE void multiply(const float* a, int64_t lda, int64_t rows, const float* b, int64_t stride, int64_t panels,
                        int64_t k, float* c, int64_t ldc, bool accumulate) {
    tile_float(a, lda, rows, b, stride, (int)panels, k, c, ldc, accumulate);
}
TN_INLINE void multiply(const uint16_t* a, int64_t lda, int64_t rows, const uint16_t* b, int64_t stride, int64_t panels,
                        int64_t k, float* c, int64_t ldc, bool accumulate) {
    tile_bf16(a, lda, rows, b, stride, (int)panels, (k + 1) / 2 * 2, c, ldc, accumulate);
}
TN_INLINE void put(float* at, v16 v) { store(at, v); }
TN_INLINE void put(uint16_t* at, v16 v) { store_bf16(at, v); }

template <class T, class E>
void many(const AttentionShape& s, const KvStore& kv, int64_t slot, int64_t kv_head, int64_t position, int64_t count,
          const float* q, int64_t ldq, float* out, int64_t ldo, Scratch& scratch) {
    const int64_t dim = s.head_dim, width = kv.width, group = s.heads / s.kv_heads, rows = count * group;
    const T* keys = (const T*)kv.keys(slot, s.layer, kv_head);
    const T* values = (const T*)kv.values(slot, s.layer, kv_head);
    const float values_by = value_factor(s, kv, kv_head);
    float* f = scratch.get<float>((size_t)(rows * (2 * width + 2 * kBlock + 2) + 2 * kBlock * width));
    float* scores = f;
    float* sums = scores + rows * kBlock;
    float* most = sums + rows * width;
    float* total = most + rows;
    E* a = (E*)(total + rows);
    E* p = (E*)((float*)a + rows * width);
    E* operand = (E*)((float*)p + rows * kBlock);

    for (int64_t r = 0; r < rows; ++r) {
        const float* head = q + r / group * ldq + (kv_head * group + r % group) * dim;
        for (int64_t d = 0; d < width; d += kLanes)
            put(a + r * width + d, load_part(head + d, (int)std::min<int64_t>(kLanes, dim - d)));
        most[r] = kNone;
        total[r] = 0;
    }
    std::memset(sums, 0, sizeof(float) * (size_t)(rows * width));

    const int64_t last = position + count;
    const int64_t from = s.window && position + 1 > s.window ? position + 1 - s.window : 0;
    for (int64_t block = from / kBlock * kBlock; block < last; block += kBlock) {
        const int64_t here = std::min(kBlock, last - block), panels = (here + kLanes - 1) / kLanes;
        const int64_t wide = panels * kLanes;
        const auto* key = key_operand(keys + block * width, width, panels, operand);
        multiply(a, width, rows, key, width * kLanes, panels, width, scores, kBlock, false);
        for (int64_t r = 0; r < rows; ++r) {
            float* row = scores + r * kBlock;
            // the query sees positions [low, high) of this block
            const int64_t at = position + r / group;
            const int64_t high = at + 1 - block, low = s.window ? at + 1 - s.window - block : 0;
            for (int64_t j = std::max<int64_t>(high, 0); j < wide; ++j) row[j] = kNone;
            for (int64_t j = 0; j < std::min(low, wide); ++j) row[j] = kNone;
            v16 top = splat(most[r]);
            for (int64_t j = 0; j < wide; j += kLanes) top = max16(top, load(row + j));
            const float now = max_lanes(top);
            v16 sum{};
            for (int64_t j = 0; j < wide; j += kLanes) {
                v16 e = exp16(load(row + j) - now);
                // a block with nothing to see: the differences are zero and must not count
                if (now <= kNone) e = v16{};
                put(p + r * kBlock + j, e);
                sum += e;
            }
            const float fade = std::exp(most[r] - now);
            total[r] = total[r] * fade + sum_lanes(sum);
            if (now != most[r]) {
                for (int64_t d = 0; d < width; d += kLanes)
                    store(sums + r * width + d, load(sums + r * width + d) * fade);
            }
            most[r] = now;
        }
        value_operand(values + block * width, width, here, operand);
        multiply(p, kBlock, rows, (const E*)operand, kBlock * kLanes, width / kLanes, here, sums, width, true);
    }
    for (int64_t r = 0; r < rows; ++r) {
        float* head = out + r / group * ldo + (kv_head * group + r % group) * dim;
        const float factor = values_by / total[r];
        for (int64_t d = 0; d < dim; d += kLanes)
            store_part(head + d, load(sums + r * width + d) * factor, (int)std::min<int64_t>(kLanes, dim - d));
    }
}

}  // namespace

void attend_many(const AttentionShape& s, const KvStore& kv, bool bf16, int64_t slot, int64_t kv_head, int64_t position,
                 int64_t count, const float* q, int64_t ldq, float* out, int64_t ldo, Scratch& scratch) {
    with_element(kv.type, [&](auto element) {
        typedef decltype(element) T;
        if (bf16) many<T, uint16_t>(s, kv, slot, kv_head, position, count, q, ldq, out, ldo, scratch);
        else many<T, float>(s, kv, slot, kv_head, position, count, q, ldq, out, ldo, scratch);
    });
}

}  // namespace tn
