// Sixteen float lanes on any machine: intrinsics where AVX-512 is there, the compiler's vector extensions elsewhere
// (GCC and clang split them into whatever registers exist). Kernels are written once against this header.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
#define TN_AVX512 1
#include <immintrin.h>
#elif defined(__AVX2__)
#include <immintrin.h>
#endif
#if defined(TN_AVX512) && defined(__AVX512BF16__)
#define TN_BF16 1
#endif

#define TN_INLINE inline __attribute__((always_inline))

namespace tn {

typedef float v16 __attribute__((vector_size(64)));
typedef int32_t v16i __attribute__((vector_size(64)));
typedef uint32_t v16u __attribute__((vector_size(64)));
constexpr int kLanes = 16;

static TN_INLINE v16 load(const float* p) {
    v16 v;
    std::memcpy(&v, p, sizeof v);
    return v;
}
static TN_INLINE void store(float* p, v16 v) { std::memcpy(p, &v, sizeof v); }
static TN_INLINE v16i load_words(const void* p) {
    v16i v;
    std::memcpy(&v, p, sizeof v);
    return v;
}
static TN_INLINE v16 splat(float x) { return v16{} + x; }

static TN_INLINE v16 load_part(const float* p, int count) {
#ifdef TN_AVX512
    return (v16)_mm512_maskz_loadu_ps((__mmask16)((1u << count) - 1), p);
#else
    v16 v{};
    std::memcpy(&v, p, sizeof(float) * count);
    return v;
#endif
}
static TN_INLINE void store_part(float* p, v16 v, int count) {
#ifdef TN_AVX512
    _mm512_mask_storeu_ps(p, (__mmask16)((1u << count) - 1), (__m512)v);
#else
    std::memcpy(p, &v, sizeof(float) * count);
#endif
}

static TN_INLINE v16 fma(v16 a, v16 b, v16 c) {
#ifdef TN_AVX512
    return (v16)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#else
    return a * b + c;
#endif
}

static TN_INLINE float bf16_to_float(uint16_t h) {
    uint32_t bits = (uint32_t)h << 16;
    float f;
    std::memcpy(&f, &bits, 4);
    return f;
}
// round to nearest even; NaN stays NaN because its payload is truncated to a quiet one
static TN_INLINE uint16_t float_to_bf16(float f) {
    uint32_t bits;
    std::memcpy(&bits, &f, 4);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return (uint16_t)((bits >> 16) | 0x40);
    return (uint16_t)((bits + 0x7fffu + ((bits >> 16) & 1)) >> 16);
}

static TN_INLINE float half_to_float(uint16_t h) {
    const uint32_t sign = (uint32_t)(h & 0x8000) << 16;
    const uint32_t rest = h & 0x7fff;
    uint32_t bits;
    float f;
    if (rest >= 0x7c00) {
        bits = sign | 0x7f800000u | (rest & 0x3ff) << 13;
        std::memcpy(&f, &bits, 4);
        return f;
    }
    // exponent and mantissa moved into place are off by a power of two, which one multiplication puts right, also
    // for subnormal halves
    bits = rest << 13;
    std::memcpy(&f, &bits, 4);
    f *= 0x1p112f;
    std::memcpy(&bits, &f, 4);
    bits |= sign;
    std::memcpy(&f, &bits, 4);
    return f;
}
static TN_INLINE uint16_t float_to_half(float f) {
    uint32_t bits;
    std::memcpy(&bits, &f, 4);
    const uint16_t sign = (uint16_t)((bits >> 16) & 0x8000);
    bits &= 0x7fffffffu;
    if (bits > 0x7f800000u) return sign | 0x7e00;
    if (bits >= 0x477ff000u) return sign | 0x7c00;
    if (bits < 0x38800000u) {
        // subnormal half: adding this constant lets the float adder round to the half's spacing
        float a;
        std::memcpy(&a, &bits, 4);
        a += 0.5f;
        std::memcpy(&bits, &a, 4);
        return sign | (uint16_t)(bits - 0x3f000000u);
    }
    const uint32_t odd = (bits >> 13) & 1;
    bits += 0xc8000fffu + odd;
    return sign | (uint16_t)(bits >> 13);
}

static TN_INLINE v16 load_bytes(const int8_t* p) {
#ifdef TN_AVX512
    return (v16)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)));
#else
    typedef int8_t v16b __attribute__((vector_size(16)));
    v16b b;
    std::memcpy(&b, p, 16);
    return __builtin_convertvector(b, v16);
#endif
}
static TN_INLINE v16 load_ubytes(const uint8_t* p) {
    typedef uint8_t v16b __attribute__((vector_size(16)));
    v16b b;
    std::memcpy(&b, p, 16);
    return __builtin_convertvector(b, v16);
}
static TN_INLINE v16 load_halves(const uint16_t* p) {
#ifdef TN_AVX512
    return (v16)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
#elif defined(__F16C__) && defined(__AVX2__)
    v16 v;
    const __m256 low = _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
    const __m256 high = _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(p + 8)));
    std::memcpy(&v, &low, 32);
    std::memcpy((char*)&v + 32, &high, 32);
    return v;
#else
    v16 v;
    for (int i = 0; i < kLanes; ++i) v[i] = half_to_float(p[i]);
    return v;
#endif
}
static TN_INLINE void store_halves(uint16_t* p, v16 v) {
#ifdef TN_AVX512
    _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#else
    for (int i = 0; i < kLanes; ++i) p[i] = float_to_half(v[i]);
#endif
}

static TN_INLINE float sum_lanes(v16 v) {
#ifdef TN_AVX512
    return _mm512_reduce_add_ps((__m512)v);
#else
    float a[16];
    std::memcpy(a, &v, 64);
    for (int width = 8; width > 0; width /= 2)
        for (int i = 0; i < width; ++i) a[i] += a[i + width];
    return a[0];
#endif
}
static TN_INLINE v16 max16(v16 a, v16 b) {
#ifdef TN_AVX512
    return (v16)_mm512_max_ps((__m512)a, (__m512)b);
#else
    return a > b ? a : b;
#endif
}
static TN_INLINE v16 min16(v16 a, v16 b) {
#ifdef TN_AVX512
    return (v16)_mm512_min_ps((__m512)a, (__m512)b);
#else
    return a < b ? a : b;
#endif
}
static TN_INLINE float max_lanes(v16 v) {
#ifdef TN_AVX512
    return _mm512_reduce_max_ps((__m512)v);
#else
    float m = v[0];
    for (int i = 1; i < kLanes; ++i) m = v[i] > m ? v[i] : m;
    return m;
#endif
}

// e^x to about 1 ulp: x = n ln2 + r, a degree-6 polynomial for e^r (Cephes coefficients), then scaling by 2^n.
// Below -87.3 the result flushes to zero, which is what softmax wants of masked scores.
static TN_INLINE v16 exp16(v16 x) {
    const v16 low = splat(-87.33654f);
    const v16 clamped = min16(max16(x, low), splat(88.72283f));
#ifdef TN_AVX512
    const v16 n = (v16)_mm512_roundscale_ps(_mm512_mul_ps((__m512)clamped, _mm512_set1_ps(1.44269504088896341f)),
                                            _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
    const v16 magic = splat(12582912.f);  // adding and subtracting 1.5 * 2^23 rounds to an integer
    v16 shifted = clamped * 1.44269504088896341f + magic;
    __asm__("" : "+m"(shifted));  // keeps the compiler from cancelling the two
    const v16 n = shifted - magic;
#endif
    v16 r = fma(n, splat(-0.693359375f), clamped);
    r = fma(n, splat(2.12194440e-4f), r);
    v16 p = splat(1.9875691500e-4f);
    p = fma(p, r, splat(1.3981999507e-3f));
    p = fma(p, r, splat(8.3334519073e-3f));
    p = fma(p, r, splat(4.1665795894e-2f));
    p = fma(p, r, splat(1.6666665459e-1f));
    p = fma(p, r, splat(5.0000001201e-1f));
    p = fma(p, r * r, r + 1.0f);
#ifdef TN_AVX512
    const v16 y = (v16)_mm512_scalef_ps((__m512)p, (__m512)n);
    return (v16)_mm512_maskz_mov_ps(_mm512_cmp_ps_mask((__m512)x, (__m512)low, _CMP_NLT_UQ), (__m512)y);
#else
    const v16i half = __builtin_convertvector(n, v16i) / 2;
    const v16i rest = __builtin_convertvector(n, v16i) - half;
    const v16 y = p * (v16)((half + 127) << 23) * (v16)((rest + 127) << 23);  // in two steps: 2^128 has no float
    return x < low ? v16{} : y;
#endif
}

static TN_INLINE v16 sigmoid16(v16 x) { return 1.0f / (1.0f + exp16(-x)); }

// erf as an odd rational function on [-4, 4] (the coefficients Eigen and XLA use), a few ulp
static TN_INLINE v16 erf16(v16 x) {
    x = min16(max16(x, splat(-4.f)), splat(4.f));
    const v16 s = x * x;
    v16 p = splat(-2.72614225801306e-10f);
    p = fma(p, s, splat(2.77068142495902e-08f));
    p = fma(p, s, splat(-2.10102402082508e-06f));
    p = fma(p, s, splat(-5.69250639462346e-05f));
    p = fma(p, s, splat(-7.34990630326855e-04f));
    p = fma(p, s, splat(-2.95459980854025e-03f));
    p = fma(p, s, splat(-1.60960333262415e-02f));
    v16 q = splat(-1.45660718464996e-05f);
    q = fma(q, s, splat(-2.13374055278905e-04f));
    q = fma(q, s, splat(-1.68282697438203e-03f));
    q = fma(q, s, splat(-7.37332916720468e-03f));
    q = fma(q, s, splat(-1.42647390514189e-02f));
    return x * p / q;
}

// two rows of sixteen floats -> sixteen pairs of bfloat16, the operand of a bfloat16 dot product
static TN_INLINE void store_pairs(uint16_t* out, v16 even, v16 odd) {
#ifdef TN_BF16
    const __m512i both = (__m512i)_mm512_cvtne2ps_pbh((__m512)odd, (__m512)even);
    const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6,
                                           21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    _mm512_storeu_si512(out, _mm512_permutexvar_epi16(order, both));
#else
    for (int i = 0; i < kLanes; ++i) {
        out[2 * i] = float_to_bf16(even[i]);
        out[2 * i + 1] = float_to_bf16(odd[i]);
    }
#endif
}

// sixteen floats -> sixteen bfloat16 in order
static TN_INLINE void store_bf16(uint16_t* out, v16 v) {
#ifdef TN_BF16
    _mm256_storeu_si256((__m256i*)out, (__m256i)_mm512_cvtneps_pbh((__m512)v));
#else
    for (int i = 0; i < kLanes; ++i) out[i] = float_to_bf16(v[i]);
#endif
}

}  // namespace tn
