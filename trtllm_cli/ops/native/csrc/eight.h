// Eight-bit numbers: E4M3 floats, int8 rounding, and integer dot products of four bytes a lane.
#pragma once
#include "simd.h"

namespace tn {

// What one unit of load_e4m3 stands for: E4M3's exponent lies 8 below float16's, so that moving the bits into place
// gives the value divided by 256, also for subnormals. Whoever uses it multiplies once at the end.
constexpr float kE4m3Unit = 256.0f;
constexpr float kE4m3Top = 448.0f;

typedef uint16_t v16h __attribute__((vector_size(32)));
typedef int16_t v16s __attribute__((vector_size(32)));

static TN_INLINE v16 halves_to_floats(v16h h) {
#ifdef TN_AVX512
    return (v16)_mm512_cvtph_ps((__m256i)h);
#else
    uint16_t bits[kLanes];
    std::memcpy(bits, &h, sizeof bits);
    return load_halves(bits);
#endif
}
// E4M3 in the upper byte of each lane -> float / 256; the lower byte is ignored
static TN_INLINE v16 high_e4m3(v16h w) { return halves_to_floats((v16h)((v16s)w >> 1) & (uint16_t)0xbf80); }

// sixteen E4M3 bytes -> floats / 256
static TN_INLINE v16 load_e4m3(const uint8_t* p) {
    typedef uint8_t v16b __attribute__((vector_size(16)));
    v16b b;
    std::memcpy(&b, p, 16);
    return high_e4m3(__builtin_convertvector(b, v16h) << 8);
}
// sixteen pairs of E4M3 bytes -> the first and the second of each pair, floats / 256
static TN_INLINE void load_e4m3_pairs(const void* p, v16& even, v16& odd) {
    v16h w;
    std::memcpy(&w, p, 32);
    even = high_e4m3(w << 8);
    odd = high_e4m3(w);
}

static TN_INLINE v16 select(v16i condition, v16 a, v16 b) {
    return (v16)(((v16i)a & condition) | ((v16i)b & ~condition));
}

// The bits of |x| / 2^-9 rounded to E4M3's spacing, saturating: codes 0..126. Ties to even.
static TN_INLINE v16u e4m3_code(v16u magnitude) {
    const v16 x = min16((v16)magnitude, splat(kE4m3Top));
    // normal numbers: round the mantissa to three bits, move the exponent from bias 127 to 7
    const v16u bits = (v16u)x;
    const v16u normal = ((bits + 0x7ffffu + ((bits >> 20) & 1u)) >> 20) - (120u << 3);
    // below 2^-6 the spacing is 2^-9, which is that of floats from 2^14: adding 2^14 rounds, ties to even
    const v16u small = (v16u)(x + 16384.0f) - 0x46800000u;
    const v16u is_small = (v16u)(bits < 0x3c800000u);
    return (small & is_small) | (normal & ~is_small);
}
// floats -> E4M3 bytes, to nearest, ties to even, saturating at 448
static TN_INLINE void store_e4m3(uint8_t* p, v16 x) {
    const v16u bits = (v16u)x;
    const v16u code = e4m3_code(bits & 0x7fffffffu) | ((bits >> 24) & 0x80u);
#ifdef TN_AVX512
    _mm_storeu_si128((__m128i*)p, _mm512_cvtepi32_epi8((__m512i)code));
#else
    for (int i = 0; i < kLanes; ++i) p[i] = (uint8_t)code[i];
#endif
}
// the value that store_e4m3 would keep
static TN_INLINE v16 round_e4m3(v16 x) {
    const v16u bits = (v16u)x, code = e4m3_code(bits & 0x7fffffffu);
    // the same exponent trick as in load_e4m3, in float32; subnormal codes are whole multiples of 2^-9
    const v16 normal = (v16)((code + (120u << 3)) << 20);
    const v16 small = __builtin_convertvector((v16i)code, v16) * 0x1p-9f;
    const v16 value = select((v16i)(code < 8u), small, normal);
    return (v16)((v16u)value | (bits & 0x80000000u));
}

// Rounds to whole numbers, ties to even; |x| below 2^22.
static TN_INLINE v16i round_whole(v16 x) {
#ifdef TN_AVX512
    return (v16i)_mm512_cvtps_epi32((__m512)x);
#else
    // adding 1.5 * 2^23 leaves the whole number in the lowest bits
    return (v16i)(x + 12582912.f) - (v16i)splat(12582912.f);
#endif
}
static TN_INLINE void store_bytes(int8_t* p, v16i v) {
#ifdef TN_AVX512
    _mm_storeu_si128((__m128i*)p, _mm512_cvtepi32_epi8((__m512i)v));
#else
    for (int i = 0; i < kLanes; ++i) p[i] = (int8_t)v[i];
#endif
}
// |x| as integers, whose order is that of the magnitudes, with NaN above all
static TN_INLINE v16i magnitude_bits(v16 x) { return (v16i)x & 0x7fffffff; }
static TN_INLINE v16i max16i(v16i a, v16i b) {
#ifdef TN_AVX512
    return (v16i)_mm512_max_epi32((__m512i)a, (__m512i)b);
#else
    return a > b ? a : b;
#endif
}
static TN_INLINE int32_t max_lanes(v16i v) {
    int32_t a[kLanes];
    std::memcpy(a, &v, sizeof a);
    int32_t most = a[0];
    for (int i = 1; i < kLanes; ++i) most = a[i] > most ? a[i] : most;
    return most;
}
static TN_INLINE int32_t sum_lanes(v16i v) {
    int32_t a[kLanes], total = 0;
    std::memcpy(a, &v, sizeof a);
    for (int i = 0; i < kLanes; ++i) total += a[i];
    return total;
}

// acc[lane] += sum over four bytes of (unsigned byte of w[lane]) * (signed byte of x), exact modulo 2^32
static TN_INLINE v16i dot4(v16i acc, v16i w, int32_t x) {
#if defined(TN_AVX512) && defined(__AVX512VNNI__)
    return (v16i)_mm512_dpbusd_epi32((__m512i)acc, (__m512i)w, _mm512_set1_epi32(x));
#elif defined(TN_AVX512)
    const __m512i row = _mm512_set1_epi32(x), low = _mm512_set1_epi16(0xff);
    const __m512i even = _mm512_madd_epi16(_mm512_and_si512((__m512i)w, low),
                                           _mm512_srai_epi16(_mm512_slli_epi16(row, 8), 8));
    const __m512i odd = _mm512_madd_epi16(_mm512_srli_epi16((__m512i)w, 8), _mm512_srai_epi16(row, 8));
    return acc + (v16i)even + (v16i)odd;
#elif defined(__AVX2__)
    const __m256i row = _mm256_set1_epi32(x), low = _mm256_set1_epi16(0xff);
    const __m256i row_even = _mm256_srai_epi16(_mm256_slli_epi16(row, 8), 8), row_odd = _mm256_srai_epi16(row, 8);
    __m256i half[2], sum[2];
    std::memcpy(half, &w, 64);
    for (int i = 0; i < 2; ++i)
        sum[i] = _mm256_add_epi32(_mm256_madd_epi16(_mm256_and_si256(half[i], low), row_even),
                                  _mm256_madd_epi16(_mm256_srli_epi16(half[i], 8), row_odd));
    v16i both;
    std::memcpy(&both, sum, 64);
    return acc + both;
#else
    for (int j = 0; j < 4; ++j) acc += (v16i)(((v16u)w >> (8 * j)) & 255u) * (int32_t)(int8_t)((uint32_t)x >> (8 * j));
    return acc;
#endif
}

}  // namespace tn
