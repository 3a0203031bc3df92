// Dequantisation of weight panels for the matrix-matrix products, and of single rows for the embedding.
#include "eight.h"
#include "gemm.h"

namespace tn {

namespace {

TN_INLINE v16 nibble_minus_8(v16i words, int j) {
#ifdef TN_AVX512
    const __m512 table = _mm512_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7);
    return (v16)_mm512_permutexvar_ps(_mm512_srlv_epi32((__m512i)words, _mm512_set1_epi32(4 * j)), table);
#else
    return __builtin_convertvector((v16i)(((v16u)words >> (4 * j)) & 15u) - 8, v16);
#endif
}

// The next block of panels: what a thread unpacks next lies one block further, and the processor's own prefetchers give
// up at the end of each page.
TN_INLINE void prefetch_block(const Weight& w, const char* at) {
    const int64_t block = kGemmPanels * w.panel_bytes();
    __builtin_prefetch(at + (block <= 262144 ? block : 4096), 0, 2);
}

// calls put(k - k0, v16) for the inputs [k0, k1) of one panel in order
template <class Put>
TN_INLINE void each_int4(const Weight& w, int64_t panel, int64_t k0, int64_t k1, Put&& put) {
    const int64_t words = w.words();
    for (int64_t g = k0 / w.group; g * w.group < k1; ++g) {
        const v16 scale = w.int4_scale(panel, g), offset = w.int4_offset(panel, g);
        const char* at = w.panel(panel) + g * words * 64;
        const int64_t begin = g * w.group - k0;
        // a block may start inside a group that is the whole row; k0 is then a multiple of 8
        for (int64_t i = begin < 0 ? -begin / 8 : 0; i < words; ++i) {
            prefetch_block(w, at + i * 64);
            const v16i packed = load_words(at + i * 64);
            const int64_t left = w.group - i * 8 < k1 - k0 - begin - i * 8 ? w.group - i * 8 : k1 - k0 - begin - i * 8;
            if (left <= 0) break;
            if (left >= 8) {
#pragma GCC unroll 8
                for (int j = 0; j < 8; ++j) put(begin + i * 8 + j, (nibble_minus_8(packed, j) - offset) * scale);
            } else {
                for (int j = 0; j < (int)left; ++j)
                    put(begin + i * 8 + j, (nibble_minus_8(packed, j) - offset) * scale);
            }
        }
    }
}

}  // namespace

void unpack_float(const Weight& w, int64_t panel, int64_t k0, int64_t k1, float* out) {
    const char* at = w.panel(panel);
    const int64_t count = k1 - k0;
    switch (w.format) {
        case kFloat32: std::memcpy(out, (const float*)at + k0 * 16, (size_t)count * 64); return;
        case kFloat16:
            for (int64_t k = 0; k < count; ++k) {
                if (k % 2 == 0) prefetch_block(w, at + (k0 + k) * 32);
                store(out + k * 16, load_halves((const uint16_t*)at + (k0 + k) * 16));
            }
            return;
        case kInt8:
            for (int64_t k = 0; k < count; ++k) {
                if (k % 4 == 0) prefetch_block(w, at + (k0 + k) * 16);
                store(out + k * 16, load_bytes((const int8_t*)at + (k0 + k) * 16));
            }
            return;
        case kE4m3:
            for (int64_t k = 0; k < count; k += 2) {
                if (k % 4 == 0) prefetch_block(w, at + (k0 + k) * 16);
                v16 even, odd;
                load_e4m3_pairs(at + (k0 + k) * 16, even, odd);
                store(out + k * 16, even * kE4m3Unit);
                if (k + 1 < count) store(out + (k + 1) * 16, odd * kE4m3Unit);
            }
            return;
        case kBfloat16:
            for (int64_t k = 0; k < count; k += 2) {
                prefetch_block(w, at + (k0 + k) / 2 * 64);
                const v16u both = (v16u)load_words(at + (k0 + k) / 2 * 64);
                store(out + k * 16, (v16)(both << 16));
                if (k + 1 < count) store(out + (k + 1) * 16, (v16)(both & 0xffff0000u));
            }
            return;
        default: each_int4(w, panel, k0, k1, [&](int64_t k, v16 v) { store(out + k * 16, v); });
    }
}

void unpack_pairs(const Weight& w, int64_t panel, int64_t k0, int64_t k1, uint16_t* out, Scratch& scratch) {
    const char* at = w.panel(panel);
    const int64_t count = k1 - k0, even = count / 2 * 2;
    if (w.format == kBfloat16) {
        std::memcpy(out, at + k0 / 2 * 64, (size_t)((count + 1) / 2 * 64));
        return;
    }
    if (w.format == kE4m3) {
        for (int64_t k = 0; k < count; k += 2) {  // what pads an odd k is zero in the packed weight
            if (k % 4 == 0) prefetch_block(w, at + (k0 + k) * 16);
            v16 even, odd;
            load_e4m3_pairs(at + (k0 + k) * 16, even, odd);
            store_pairs(out + k * 16, even * kE4m3Unit, odd * kE4m3Unit);
        }
        return;
    }
    if (w.format == kInt8) {
        const int8_t* p = (const int8_t*)at + k0 * 16;
        for (int64_t k = 0; k < even; k += 2) {
            if (k % 4 == 0) prefetch_block(w, (const char*)p + k * 16);
            store_pairs(out + k * 16, load_bytes(p + k * 16), load_bytes(p + (k + 1) * 16));
        }
        if (even < count) store_pairs(out + even * 16, load_bytes(p + even * 16), v16{});
        return;
    }
    if (w.format == kFloat16) {
        const uint16_t* p = (const uint16_t*)at + k0 * 16;
        for (int64_t k = 0; k < even; k += 2) {
            prefetch_block(w, (const char*)(p + k * 16));
            store_pairs(out + k * 16, load_halves(p + k * 16), load_halves(p + (k + 1) * 16));
        }
        if (even < count) store_pairs(out + even * 16, load_halves(p + even * 16), v16{});
        return;
    }
    if (w.format == kInt4 && w.group % 2 == 0) {
        v16 held{};
        each_int4(w, panel, k0, k1, [&](int64_t k, v16 v) {
            if (k & 1) store_pairs(out + (k - 1) * 16, held, v);
            held = v;
        });
        return;
    }
    float* plain = scratch.get<float>((size_t)count * 16);
    unpack_float(w, panel, k0, k1, plain);
    for (int64_t k = 0; k < even; k += 2) store_pairs(out + k * 16, load(plain + k * 16), load(plain + (k + 1) * 16));
    if (even < count) store_pairs(out + even * 16, load(plain + even * 16), v16{});
}

void embedding_row(const Weight& w, int64_t index, float* out) {
    const int64_t panel = index / kLanes, lane = index % kLanes;
    const char* at = w.panel(panel);
    switch (w.format) {
        case kFloat32:
            for (int64_t k = 0; k < w.k; ++k) out[k] = ((const float*)at)[k * 16 + lane];
            return;
        case kFloat16:
            for (int64_t k = 0; k < w.k; ++k) out[k] = half_to_float(((const uint16_t*)at)[k * 16 + lane]);
            return;
        case kBfloat16:
            for (int64_t k = 0; k < w.k; ++k)
                out[k] = bf16_to_float(((const uint16_t*)at)[k / 2 * 32 + lane * 2 + k % 2]);
            return;
        case kInt8: {
            const float scale = ((const float*)w.scale)[index];
            for (int64_t k = 0; k < w.k; ++k) out[k] = (float)((const int8_t*)at)[k * 16 + lane] * scale;
            return;
        }
        case kInt8Dot: {
            const float scale = ((const float*)w.scale)[index];
            for (int64_t k = 0; k < w.k; ++k)
                out[k] = (float)((int)((const uint8_t*)at)[k / 4 * 64 + lane * 4 + k % 4] - 128) * scale;
            return;
        }
        case kE4m3: {
            const float scale = ((const float*)w.scale)[index] * kE4m3Unit;
            for (int64_t k = 0; k < w.k; ++k) {
                uint8_t one[kLanes] = {((const uint8_t*)at)[k / 2 * 32 + lane * 2 + k % 2]};
                out[k] = load_e4m3(one)[0] * scale;
            }
            return;
        }
        default:
            for (int64_t g = 0; g < w.groups(); ++g) {
                const v16 scales = w.int4_scale(panel, g), offsets = w.int4_offset(panel, g);
                const float scale = scales[lane], zero = 8.0f + offsets[lane];
                const uint32_t* words = (const uint32_t*)at + g * w.words() * 16 + lane;
                for (int64_t k = 0; k < w.group; ++k)
                    out[g * w.group + k] = ((float)((words[k / 8 * 16] >> (k % 8 * 4)) & 15) - zero) * scale;
            }
    }
}

}  // namespace tn
