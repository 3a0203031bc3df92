// The element types of the cache: reading sixteen as floats, and writing sixteen.
#pragma once
#include "attention.h"
#include "eight.h"

namespace tn {

struct Int8Element {
    int8_t bits;
};
struct E4m3Element {
    uint8_t bits;
};

template <class T>
struct Stored;
template <>
struct Stored<uint16_t> {
    static TN_INLINE v16 get(const uint16_t* p) { return load_halves(p); }
    static TN_INLINE void put(uint16_t* p, v16 v) { store_halves(p, v); }
};
template <>
struct Stored<float> {
    static TN_INLINE v16 get(const float* p) { return load(p); }
    static TN_INLINE void put(float* p, v16 v) { store(p, v); }
};
// put takes values divided by their scale
template <>
struct Stored<Int8Element> {
    static TN_INLINE v16 get(const Int8Element* p) { return load_bytes(&p->bits); }
    static TN_INLINE void put(Int8Element* p, v16 v) {
        store_bytes(&p->bits, round_whole(min16(max16(v, splat(-127.f)), splat(127.f))));
    }
};
// get gives kE4m3Unit times less than put took
template <>
struct Stored<E4m3Element> {
    static TN_INLINE v16 get(const E4m3Element* p) { return load_e4m3(&p->bits); }
    static TN_INLINE void put(E4m3Element* p, v16 v) { store_e4m3(&p->bits, v); }
};

// Calls body with a value of the element type of a cache.
template <class Body>
TN_INLINE void with_element(int type, Body&& body) {
    switch (type) {
        case kHalfCache: return body(uint16_t());
        case kFloatCache: return body(float());
        case kInt8Cache: return body(Int8Element());
        default: return body(E4m3Element());
    }
}

}  // namespace tn
