// Attention over a contiguous key/value cache.
#pragma once
#include "gemm.h"

namespace tn {

constexpr int64_t kBlock = 64;    // cache positions a step of the many-query kernel
constexpr int64_t kChunk = 1024;  // cache positions a task of the one-query kernel, at fixed boundaries

// How keys and values are kept. The eight-bit ones are fractions of a scale of their layer and head.
enum CacheType { kHalfCache = 0, kFloatCache = 1, kInt8Cache = 2, kE4m3Cache = 3 };

// Keys and values of every slot and layer. Per (slot, layer, head): keys [C/16][D][16], so that sixteen positions are
// the lanes of a score, and values [C][D]; C is the context rounded up to kBlock, D the head size to sixteen.
struct KvStore {
    Pages pages;
    int type = kHalfCache;
    int64_t slots = 0, layers = 0, heads = 0, context = 0, head_dim = 0;
    int64_t positions = 0, width = 0;  // rounded up

    void allocate();
    int64_t element() const { return type == kFloatCache ? 4 : type == kHalfCache ? 2 : 1; }
    int64_t head_bytes() const { return positions * width * element(); }
    char* keys(int64_t slot, int64_t layer, int64_t head) const {
        return (char*)pages.data() + (((slot * layers + layer) * heads + head) * 2) * head_bytes();
    }
    char* values(int64_t slot, int64_t layer, int64_t head) const { return keys(slot, layer, head) + head_bytes(); }
    void copy(int64_t source, int64_t target, int64_t length) const;
};

struct AttentionShape {
    int64_t layer = 0, heads = 0, kv_heads = 0, head_dim = 0;
    int64_t window = 0;  // 0: unlimited
    float scale = 1.0f, eps = 0.0f;
    const float* q_norm = nullptr;  // [head_dim] or null
    const float* k_norm = nullptr;
    const float* k_scale = nullptr;  // [kv_heads], of an eight-bit cache
    const float* v_scale = nullptr;
    const float* cos = nullptr;  // [context][rotary / 2]
    const float* sin = nullptr;
    int64_t rotary = 0;
};

// One new token's heads of one key/value head: normalises and rotates q in place, scaled by `scale` (and by the scale
// of the cache's keys, so that nobody need multiply those), and writes k and v into the cache at `position`.
void prepare_heads(const AttentionShape& s, const KvStore& kv, int64_t slot, int64_t kv_head, int64_t position,
                   float* q, const float* k, const float* v);

// One query over cache positions [first, last) of one chunk, for the G query heads of a kv head (q [G][head_dim]).
// Writes out [G][head_dim] normalised when `partial` is null; else unnormalised sums into partial [G][width + 2], the
// last two being the maximum and the sum of exponentials.
void attend_one(const AttentionShape& s, const KvStore& kv, int64_t slot, int64_t kv_head, int64_t first, int64_t last,
                const float* q, float* out, float* partial, Scratch& scratch);
// Puts `chunks` partial results, `stride` floats apart, together into out [head_dim], times `factor`.
void combine(const KvStore& kv, const float* partial, int64_t stride, int64_t chunks, float factor, float* out);
// What sums over cached values of a head must be multiplied by.
float value_factor(const AttentionShape& s, const KvStore& kv, int64_t kv_head);

// Queries at positions [position, position + count) of one kv head: q and out point at the first query's heads and
// advance by ldq and ldo a query.
void attend_many(const AttentionShape& s, const KvStore& kv, bool bf16, int64_t slot, int64_t kv_head, int64_t position,
                 int64_t count, const float* q, int64_t ldq, float* out, int64_t ldo, Scratch& scratch);

}  // namespace tn
