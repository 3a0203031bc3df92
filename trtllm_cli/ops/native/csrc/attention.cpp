// The cache, the preparation of new tokens, and attention of a single query (decoding).
#include "attention.h"

#include <algorithm>

#include "cached.h"
#include "small.h"

namespace tn {

namespace {

constexpr float kNone = -1e30f;  // below every score, and finite so that differences of two are numbers

void rotate(float* x, const float* cos, const float* sin, int64_t half) {
    int64_t i = 0;
    for (; i + kLanes <= half; i += kLanes) {
        const v16 c = load(cos + i), s = load(sin + i), a = load(x + i), b = load(x + half + i);
        store(x + i, a * c - b * s);
        store(x + half + i, b * c + a * s);
    }
    for (; i < half; ++i) {
        const float a = x[i], b = x[half + i];
        x[i] = a * cos[i] - b * sin[i];
        x[half + i] = b * cos[i] + a * sin[i];
    }
}

template <class T>
void write_cache(const KvStore& kv, int64_t slot, int64_t layer, int64_t head, int64_t position, const float* k,
                 const float* v, float k_scale, float v_scale) {
    const int64_t width = kv.width;
    T* keys = (T*)kv.keys(slot, layer, head) + position / kLanes * width * kLanes + position % kLanes;
    T* values = (T*)kv.values(slot, layer, head) + position * width;
    // the padding is zero from the start and nothing but zero is written there
    for (int64_t d = 0; d < kv.head_dim; d += kLanes) {
        const int count = (int)std::min<int64_t>(kLanes, kv.head_dim - d);
        T row[kLanes];
        Stored<T>::put(row, load_part(k + d, count) / k_scale);
        for (int i = 0; i < count; ++i) keys[(d + i) * kLanes] = row[i];
        Stored<T>::put(values + d, load_part(v + d, count) / v_scale);
    }
}

// scores of HEADS queries against BLOCKS x 16 positions
template <class T, int HEADS, int BLOCKS>
TN_INLINE void score(const T* keys, int64_t width, int64_t dim, const float* q, int64_t ldq, float* out, int64_t ldo) {
    v16 acc[HEADS][BLOCKS] = {};
    for (int64_t d = 0; d < dim; ++d) {
        v16 key[BLOCKS];
        for (int b = 0; b < BLOCKS; ++b) key[b] = Stored<T>::get(keys + (b * width + d) * kLanes);
        for (int h = 0; h < HEADS; ++h)
            for (int b = 0; b < BLOCKS; ++b) acc[h][b] = fma(splat(q[h * ldq + d]), key[b], acc[h][b]);
    }
    for (int h = 0; h < HEADS; ++h)
        for (int b = 0; b < BLOCKS; ++b) store(out + h * ldo + b * kLanes, acc[h][b]);
}

// sums over positions of probability x value for HEADS heads and PARTS x 16 elements
template <class T, int HEADS, int PARTS>
TN_INLINE void mix(const T* values, int64_t width, int64_t count, const float* p, int64_t ldp, float* out,
                   int64_t ldo) {
    v16 acc[HEADS][PARTS] = {};
    for (int64_t j = 0; j < count; ++j) {
        v16 value[PARTS];
        for (int i = 0; i < PARTS; ++i) value[i] = Stored<T>::get(values + j * width + i * kLanes);
        for (int h = 0; h < HEADS; ++h) {
            const v16 weight = splat(p[h * ldp + j]);
            for (int i = 0; i < PARTS; ++i) acc[h][i] = fma(weight, value[i], acc[h][i]);
        }
    }
    for (int h = 0; h < HEADS; ++h)
        for (int i = 0; i < PARTS; ++i) store(out + h * ldo + i * kLanes, acc[h][i]);
}

// The heads of one group, up to four at a time: scores, softmax, weighted values. begin is a multiple of sixteen.
template <class T, int HEADS>
void heads_of(const KvStore& kv, const T* keys, const T* values, int64_t first, int64_t last, const float* q,
              int64_t ldq, float* p, int64_t ldp, float* sums, int64_t lds) {
    const int64_t width = kv.width, begin = first / kLanes * kLanes, end = (last + kLanes - 1) / kLanes * kLanes;
    int64_t j = begin;
    for (; j + 4 * kLanes <= end; j += 4 * kLanes)
        score<T, HEADS, 4>(keys + j * width, width, kv.head_dim, q, ldq, p + (j - begin), ldp);
    for (; j < end; j += kLanes)
        score<T, HEADS, 1>(keys + j * width, width, kv.head_dim, q, ldq, p + (j - begin), ldp);
    for (int h = 0; h < HEADS; ++h) {
        float* row = p + h * ldp;
        for (j = begin; j < first; ++j) row[j - begin] = kNone;
        for (j = last; j < end; ++j) row[j - begin] = kNone;
        v16 top = splat(kNone), total{};
        for (j = 0; j < end - begin; j += kLanes) top = max16(top, load(row + j));
        const float most = max_lanes(top);
        for (j = 0; j < end - begin; j += kLanes) {
            const v16 e = exp16(load(row + j) - most);
            store(row + j, e);
            total += e;
        }
        sums[h * lds + width] = most;
        sums[h * lds + width + 1] = sum_lanes(total);
    }
    const T* from = values + first * width;
    const float* weights = p + (first - begin);
    int64_t i = 0;
    for (; i + 4 * kLanes <= width; i += 4 * kLanes)
        mix<T, HEADS, 4>(from + i, width, last - first, weights, ldp, sums + i, lds);
    for (; i < width; i += kLanes) mix<T, HEADS, 1>(from + i, width, last - first, weights, ldp, sums + i, lds);
}

template <class T>
void attend_stored(const AttentionShape& s, const KvStore& kv, int64_t slot, int64_t kv_head, int64_t first,
                   int64_t last, const float* q, float* sums, float* p, int64_t ldp) {
    const T* keys = (const T*)kv.keys(slot, s.layer, kv_head);
    const T* values = (const T*)kv.values(slot, s.layer, kv_head);
    const int64_t group = s.heads / s.kv_heads, lds = kv.width + 2;
    for (int64_t h = 0; h < group;) {
        const int64_t left = group - h;
        const float* at = q + h * s.head_dim;
        float* out = sums + h * lds;
        if (left >= 4) {
            heads_of<T, 4>(kv, keys, values, first, last, at, s.head_dim, p, ldp, out, lds);
            h += 4;
        } else if (left == 3) {
            heads_of<T, 3>(kv, keys, values, first, last, at, s.head_dim, p, ldp, out, lds);
            h += 3;
        } else if (left == 2) {
            heads_of<T, 2>(kv, keys, values, first, last, at, s.head_dim, p, ldp, out, lds);
            h += 2;
        } else {
            heads_of<T, 1>(kv, keys, values, first, last, at, s.head_dim, p, ldp, out, lds);
            h += 1;
        }
    }
}

// What stored numbers of a head must be multiplied by to be keys or values.
float cache_factor(const KvStore& kv, const float* scales, int64_t head) {
    if (kv.type == kInt8Cache) return scales[head];
    return kv.type == kE4m3Cache ? scales[head] * kE4m3Unit : 1.0f;
}

}  // namespace

float value_factor(const AttentionShape& s, const KvStore& kv, int64_t kv_head) {
    return cache_factor(kv, s.v_scale, kv_head);
}

void KvStore::allocate() {
    positions = (context + kBlock - 1) / kBlock * kBlock;
    width = (head_dim + kLanes - 1) / kLanes * kLanes;
    pages = Pages((size_t)(slots * layers * heads * 2 * head_bytes()));
}

void KvStore::copy(int64_t source, int64_t target, int64_t length) const {
    // whole groups of sixteen positions: what lies beyond `length` in the last one is masked until it is overwritten
    const size_t bytes = (size_t)((length + kLanes - 1) / kLanes * kLanes * width * element());
    for (int64_t layer = 0; layer < layers; ++layer) {
        for (int64_t head = 0; head < heads; ++head) {
            std::memcpy(keys(target, layer, head), keys(source, layer, head), bytes);
            std::memcpy(values(target, layer, head), values(source, layer, head), bytes);
        }
    }
}

void prepare_heads(const AttentionShape& s, const KvStore& kv, int64_t slot, int64_t kv_head, int64_t position,
                   float* q, const float* k, const float* v) {
    const int64_t dim = s.head_dim, half = s.rotary / 2, group = s.heads / s.kv_heads;
    const float scale = s.scale * cache_factor(kv, s.k_scale, kv_head);
    const float *cos = s.cos + position * half, *sin = s.sin + position * half;
    for (int64_t h = 0; h < group; ++h) {
        float* head = q + (kv_head * group + h) * dim;
        if (s.q_norm) rms_norm(head, s.q_norm, s.eps, dim, head);
        rotate(head, cos, sin, half);
        for (int64_t d = 0; d < dim; ++d) head[d] *= scale;
    }
    float key[1024];
    std::memcpy(key, k + kv_head * dim, sizeof(float) * (size_t)dim);
    if (s.k_norm) rms_norm(key, s.k_norm, s.eps, dim, key);
    rotate(key, cos, sin, half);
    const float* const row = key;
    with_element(kv.type, [&](auto element) {
        typedef decltype(element) T;
        const bool scaled = sizeof(T) == 1;
        write_cache<T>(kv, slot, s.layer, kv_head, position, row, v + kv_head * dim,
                       scaled ? s.k_scale[kv_head] : 1.0f, scaled ? s.v_scale[kv_head] : 1.0f);
    });
}

void attend_one(const AttentionShape& s, const KvStore& kv, int64_t slot, int64_t kv_head, int64_t first, int64_t last,
                const float* q, float* out, float* partial, Scratch& scratch) {
    const int64_t group = s.heads / s.kv_heads, lds = kv.width + 2, ldp = kChunk + 2 * kLanes;
    float* p = scratch.get<float>((size_t)(4 * ldp + group * lds));
    float* sums = partial ? partial : p + 4 * ldp;
    with_element(kv.type, [&](auto element) {
        attend_stored<decltype(element)>(s, kv, slot, kv_head, first, last, q, sums, p, ldp);
    });
    if (partial) return;
    const float factor = value_factor(s, kv, kv_head);
    for (int64_t h = 0; h < group; ++h) combine(kv, sums + h * lds, 0, 1, factor, out + h * s.head_dim);
}

void combine(const KvStore& kv, const float* partial, int64_t stride, int64_t chunks, float factor, float* out) {
    const int64_t width = kv.width;
    float most = kNone;
    for (int64_t c = 0; c < chunks; ++c) most = std::max(most, partial[c * stride + width]);
    float total = 0;
    for (int64_t c = 0; c < chunks; ++c)
        total += partial[c * stride + width + 1] * std::exp(partial[c * stride + width] - most);
    for (int64_t d = 0; d < kv.head_dim; d += kLanes) {
        v16 sum{};
        for (int64_t c = 0; c < chunks; ++c)
            sum = fma(load(partial + c * stride + d), splat(std::exp(partial[c * stride + width] - most)), sum);
        store_part(out + d, sum * factor / total, (int)std::min<int64_t>(kLanes, kv.head_dim - d));
    }
}

}  // namespace tn
