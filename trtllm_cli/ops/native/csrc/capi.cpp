// The C interface that library.py binds: plain integers, floats and pointers, errors as a code and a message.
#include <algorithm>

#include "cached.h"
#include "gram.h"
#include "model.h"

using namespace tn;

namespace {

thread_local std::string message;

template <class Body>
int guarded(Body&& body) {
    try {
        body();
        return kOk;
    } catch (const Failure& e) {
        message = e.what();
        return e.code;
    } catch (const std::bad_alloc&) {
        message = "the system refused memory";
        return kNoMemory;
    } catch (const std::exception& e) {
        message = e.what();
        return kInternal;
    }
}

Weight make_weight(int format, int64_t n, int64_t k, int64_t group, int half_scale, const void* packed,
                   const void* scale, const void* zero, const void* bias) {
    Weight w;
    w.format = format;
    w.n = n;
    w.k = k;
    w.group = group;
    w.half_scale = half_scale != 0;
    w.packed = packed;
    w.scale = scale;
    w.zero = (const uint8_t*)zero;
    w.bias = (const float*)bias;
    return w;
}

}  // namespace

#pragma GCC visibility push(default)  // everything else stays inside the library
extern "C" {

int tn_abi() { return 2; }

const char* tn_isa() {
#if defined(TN_BF16)
    return "avx512bf16";
#elif defined(TN_AVX512)
    return "avx512";
#elif defined(__AVX2__)
    return "avx2";
#else
    return "portable";
#endif
}

const char* tn_message() { return message.c_str(); }

int tn_new(int threads, int64_t chunk, int bf16, int64_t vocab, int64_t slots, int64_t layers, int64_t kv_heads,
           int64_t context, int64_t head_dim, int cache, void** out) {
    return guarded([&] {
        auto model = std::make_unique<Model>(threads, chunk, bf16 != 0, vocab);
        model->kv.slots = slots;
        model->kv.layers = layers;
        model->kv.heads = kv_heads;
        model->kv.context = context;
        model->kv.head_dim = head_dim;
        model->kv.type = cache;
        *out = model.release();
    });
}

void tn_free(void* model) { delete (Model*)model; }

int tn_add_weight(void* model, int format, int64_t n, int64_t k, int64_t group, int half_scale, const void* packed,
                  const void* scale, const void* zero, const void* bias) {
    return guarded([&] {
        ((Model*)model)
            ->weights.push_back(make_weight(format, n, k, group, half_scale, packed, scale, zero, bias));
    });
}

int tn_add_vector(void* model, const float* values) {
    return guarded([&] { ((Model*)model)->vectors.push_back(values); });
}

int tn_add_buffer(void* model, int64_t width) {
    return guarded([&] { ((Model*)model)->widths.push_back(width); });
}

int tn_add_rotary(void* model, const float* cos, const float* sin, int64_t dim) {
    return guarded([&] { ((Model*)model)->rotaries.push_back({cos, sin, dim}); });
}

// Where each input of a linear comes from: its `order` index is that of the call.
int tn_add_order(void* model, const int32_t* order) {
    return guarded([&] { ((Model*)model)->orders.push_back(order); });
}

// Scales [kv_heads] of the next layer's keys and values in an eight-bit cache.
int tn_add_kv_scales(void* model, const float* k, const float* v) {
    return guarded([&] { ((Model*)model)->kv_scales.push_back({k, v}); });
}

// ints: kind, prologue, x, y, z, total, out, weight, vector, activation, rotary, order, quantize, outputs, dim, layer,
// heads, kv_heads, head_dim, window, q_norm, k_norm, parts, then weight and out of each part. floats: eps, scale,
// input scale.
int tn_add_op(void* model, const int64_t* ints, const float* floats) {
    return guarded([&] {
        Model& m = *(Model*)model;
        Op op;
        int* plain[] = {&op.kind,   &op.prologue,   &op.x,      &op.y,     &op.z,       &op.total, &op.out,
                        &op.weight, &op.vector, &op.activation, &op.rotary, &op.order, &op.quantize};
        for (int* field : plain) *field = (int)*ints++;
        op.outputs = *ints++ != 0;
        op.dim = *ints++;
        AttentionShape& s = op.attention;
        s.layer = *ints++;
        s.heads = *ints++;
        s.kv_heads = *ints++;
        s.head_dim = *ints++;
        s.window = *ints++;
        const int64_t q_norm = *ints++, k_norm = *ints++;
        s.q_norm = q_norm < 0 ? nullptr : m.vectors.at((size_t)q_norm);
        s.k_norm = k_norm < 0 ? nullptr : m.vectors.at((size_t)k_norm);
        for (int64_t parts = *ints++; parts > 0; --parts, ints += 2) op.parts.push_back({(int)ints[0], (int)ints[1]});
        op.eps = s.eps = floats[0];
        s.scale = floats[1];
        op.input_scale = floats[2];
        m.ops.push_back(op);
    });
}

int tn_finish(void* model) {
    return guarded([&] { ((Model*)model)->finish(); });
}

// segments [count][4]: slot, start, tokens, want
int tn_forward(void* model, int64_t count, const int64_t* segments, const int32_t* tokens, float* logits) {
    return guarded([&] {
        Model& m = *(Model*)model;
        std::lock_guard<std::mutex> lock(m.mutex);
        std::vector<Segment> list;
        for (int64_t i = 0; i < count; ++i, segments += 4)
            list.push_back({segments[0], segments[1], segments[2], segments[3]});
        m.forward(list, tokens, logits);
    });
}

int tn_copy_slot(void* model, int64_t source, int64_t target, int64_t length) {
    return guarded([&] {
        Model& m = *(Model*)model;
        std::lock_guard<std::mutex> lock(m.mutex);
        m.kv.copy(source, target, length);
        m.lengths[(size_t)target] = (int32_t)length;
    });
}

int32_t* tn_lengths(void* model) { return ((Model*)model)->lengths.data(); }
int64_t tn_cache_bytes(void* model) { return (int64_t)((Model*)model)->kv.pages.bytes(); }
int64_t tn_scratch_bytes(void* model) { return ((Model*)model)->scratch_bytes(); }
void tn_poison(void* model) { ((Model*)model)->poison(); }

int tn_gram(float* hessian, int64_t k, const uint16_t* x, int64_t m, int threads) {
    return guarded([&] {
        if (!kHasBf16) throw Failure(kInternal, "this build has no bfloat16 products");
        gram(hessian, k, x, m, threads);
    });
}

// ---- single kernels, for tests ----

// mode 0: gemv (rows <= 8), 1: float32 gemm, 2: bfloat16 gemm, 3: gemv in bfloat16 parts where that exists, 4: int8
// activations, quantized with their own scales. x [rows][k] float32 -> y [rows][n].
int tn_test_linear(int mode, int format, int64_t n, int64_t k, int64_t group, int half_scale, const void* packed,
                   const void* scale, const void* zero, const void* bias, const float* x, int64_t rows, float* y) {
    return guarded([&] {
        const Weight w = make_weight(format, n, k, group, half_scale, packed, scale, zero, bias);
        if (mode == 4) {
            const int64_t ld = (k + 63) / 64 * 64;
            std::vector<int8_t> bytes((size_t)(rows * ld));
            std::vector<float> scales((size_t)rows);
            std::vector<int32_t> whole((size_t)rows);
            for (int64_t r = 0; r < rows; ++r) {
                scales[(size_t)r] = row_scale(x + r * k, k, 0, 127);
                quantize_int8(x + r * k, k, ld, scales[(size_t)r], bytes.data() + r * ld, whole[(size_t)r]);
            }
            product_int8(w, {bytes.data(), ld, scales.data(), whole.data()}, 0, rows, y, n, 0, w.panels());
            return;
        }
        if (mode == 0 || mode == 3) {
            std::vector<float> sums((size_t)(rows * w.groups()));
            group_sums(w, x, k, w.zero ? (int)rows : 0, sums.data());
            if (mode == 3 && can_split(w)) {
                std::vector<uint32_t> halves((size_t)(rows * k));
                split(x, k, (int)rows, k, halves.data());
                gemv_split(w, halves.data(), (int)rows, sums.data(), y, n, 0, w.panels());
            } else {
                gemv(w, x, k, (int)rows, sums.data(), nullptr, y, n, 0, w.panels());
            }
            return;
        }
        if (mode == 2 && !kHasBf16) throw Failure(kInternal, "this build has no bfloat16 products");
        const int64_t padded = (k + kLanes - 1) / kLanes * kLanes;
        std::vector<float> a((size_t)(rows * padded));
        for (int64_t r = 0; r < rows; ++r) {
            if (mode == 2) round_row(x + r * k, k, padded, (uint16_t*)a.data() + r * padded);
            else std::copy(x + r * k, x + (r + 1) * k, a.data() + r * padded);
        }
        PanelCache cache;
        for (int64_t p = 0; p < w.panels(); p += kGemmPanels)
            gemm(w, mode == 2, a.data(), padded, nullptr, 0, rows, y, n, p,
                 (int)std::min<int64_t>(kGemmPanels, w.panels() - p), cache);
    });
}

int tn_test_embedding(int format, int64_t n, int64_t k, int64_t group, int half_scale, const void* packed,
                      const void* scale, const void* zero, int64_t index, float* out) {
    return guarded([&] {
        embedding_row(make_weight(format, n, k, group, half_scale, packed, scale, zero, nullptr), index, out);
    });
}

// A row in eight bits: type 1 whole numbers, 2 E4M3 values, as floats; `fixed` scale or 0 -> values [k], its scale.
void tn_test_quantize(int type, const float* x, int64_t k, float fixed, float* values, float* scale) {
    *scale = row_scale(x, k, fixed, type == kInt8Activation ? 127.0f : kE4m3Top);
    if (type == kE4m3Activation) return quantize_e4m3(x, k, *scale, values);
    std::vector<int8_t> bytes((size_t)((k + 63) / 64 * 64));
    int32_t sum;
    quantize_int8(x, k, (int64_t)bytes.size(), *scale, bytes.data(), sum);
    std::copy(bytes.begin(), bytes.begin() + k, values);
}

// x [16 n] through bytes of an eight-bit cache type and back.
void tn_test_cached(int type, const float* x, int64_t count, float* out) {
    with_element(type, [&](auto element) {
        typedef decltype(element) T;
        for (int64_t i = 0; i + kLanes <= count; i += kLanes) {
            T kept[kLanes];
            Stored<T>::put(kept, load(x + i));
            store(out + i, Stored<T>::get(kept) * (type == kE4m3Cache ? kE4m3Unit : 1.0f));
        }
    });
}

// which: 0 exp, 1 erf, 2.. activation + 2 of x times one
void tn_test_function(int which, const float* x, int64_t count, float* out) {
    for (int64_t i = 0; i + kLanes <= count; i += kLanes) {
        const v16 one = splat(1.0f);
        if (which == 0) store(out + i, exp16(load(x + i)));
        else if (which == 1) store(out + i, erf16(load(x + i)));
        else gated(x + i, (const float*)&one, which - 2, kLanes, out + i);
    }
}

}  // extern "C"
#pragma GCC visibility pop
