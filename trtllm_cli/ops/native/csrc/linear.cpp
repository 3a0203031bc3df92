// A linear: its input made, reordered and quantized once for all its products, and the products shared by the threads.
#include <algorithm>

#include "eight.h"
#include "model.h"

namespace tn {

namespace {

constexpr int64_t kTaskRows = 96;
constexpr int64_t kByteAlign = 64;  // rows of int8 activations start here
constexpr float kInt8Top = 127.0f;

int64_t round_up(int64_t value, int64_t step) { return (value + step - 1) / step * step; }

float scale_of(const Op& op, const float* row) {
    return row_scale(row, op.dim, op.input_scale, op.quantize == kInt8Activation ? kInt8Top : kE4m3Top);
}

}  // namespace

// The input of a linear, row r, as float32 into `out`.
void Model::make_row(const Op& op, int64_t r, float* out, bool keep_total, Local& local) const {
    const float* plain = op.prologue == kPlainInput ? buffers_[op.x].row(r) : nullptr;
    float* made = op.order < 0 ? out : plain ? nullptr : local.whole.get<float>((size_t)op.dim);
    switch (op.prologue) {
        case kNormInput: rms_norm(buffers_[op.x].row(r), vectors[op.vector], op.eps, op.dim, made); break;
        case kAddNormInput:
            add_rms_norm(buffers_[op.x].row(r), buffers_[op.y].row(r),
                         keep_total && op.total >= 0 ? buffers_[op.total].row(r) : nullptr,
                         vectors[op.vector], op.eps, op.dim, made);
            break;
        case kGatedInput:
            gated(buffers_[op.x].row(r), buffers_[op.y].row(r), op.activation, op.dim, made);
            break;
        default:
            if (op.order < 0) std::memcpy(out, plain, sizeof(float) * (size_t)op.dim);
    }
    if (op.order < 0) return;
    const float* from = plain ? plain : made;
    const int32_t* order = orders[(size_t)op.order];
    for (int64_t i = 0; i < op.dim; ++i) out[i] = from[order[i]];
}

float* Model::output(const Part& part, int64_t& ldy) const {
    ldy = part.out < 0 ? vocab_ : buffers_[part.out].stride;
    return part.out < 0 ? pass_.logits : buffers_[part.out].row(0);
}

int64_t Model::panels_of(const Op& op) const {
    int64_t panels = 0;
    for (const Part& part : op.parts) panels += weights[(size_t)part.weight].panels();
    return panels;
}

void Model::linear(const Op& op, const Op* next, Worker& worker, Local& local) {
    const int64_t rows = op.outputs ? pass_.outputs : pass_.tokens;
    if (rows <= (bf16_ ? kFewRowsBf16 : kFewRows)) linear_few(op, next, worker, local);
    else linear_many(op, worker, local);
}

void Model::linear_few(const Op& op, const Op* next, Worker& worker, Local& local) {
    const int64_t rows = op.outputs ? pass_.outputs : pass_.tokens;
    const int64_t k = op.dim, padded = round_up(k, kLanes), bytes = round_up(k, kByteAlign);
    const bool as_it_is = op.prologue == kPlainInput && op.order < 0 && op.quantize == kNoActivation;
    const bool whole = op.quantize == kInt8Activation;
    const float* x = as_it_is ? buffers_[op.x].row(0) : nullptr;
    const int64_t ldx = as_it_is ? buffers_[op.x].stride : padded;
    float own_scales[kGemvRows];
    int32_t own_sums[kGemvRows];
    const float* scales = nullptr;
    Int8Rows ints{};
    if (!as_it_is) {
        // one or two rows are cheaper to make everywhere than to wait for each other; one thread keeps the sum
        const bool everywhere = rows <= 2;
        float* own = local.rows.get<float>((size_t)(kGemvRows * padded));
        float* made = everywhere ? own : input_.floats();
        float* row_scales = everywhere ? own_scales : scales_.data();
        int32_t* sums = everywhere ? own_sums : sums_.data();
        int8_t* data = nullptr;
        if (whole) data = everywhere ? local.bytes.get<int8_t>((size_t)(kGemvRows * bytes)) : (int8_t*)input_.data();
        const auto make = [&](int64_t r, bool keep_total) {
            float* row = whole ? own : made + r * padded;
            make_row(op, r, row, keep_total, local);
            if (op.quantize == kNoActivation) return;
            row_scales[r] = scale_of(op, row);
            if (whole) quantize_int8(row, k, bytes, row_scales[r], data + r * bytes, sums[r]);
            else quantize_e4m3(row, k, row_scales[r], row);
        };
        if (everywhere) {
            for (int64_t r = 0; r < rows; ++r) make(r, worker.index == 0);
        } else {
            worker.share(rows, 1, [&](int64_t r, int64_t) { make(r, true); });
            worker.barrier();
        }
        x = made;
        if (op.quantize != kNoActivation) scales = row_scales;
        ints = {data, bytes, row_scales, sums};
    }
    prefetch_cache(next, worker, 2 * kPrefetchIdleBytes);
    // the bfloat16 mode reads int4 weights as bfloat16, against activations in two parts
    uint32_t* halves = nullptr;
    for (const Part& part : op.parts) {
        if (halves || !bf16_ || !can_split(weights[(size_t)part.weight])) continue;
        halves = local.halves.get<uint32_t>((size_t)(kGemvRows * k));
        split(x, ldx, (int)rows, k, halves);
    }
    worker.share(panels_of(op), 4, [&](int64_t first, int64_t last) {
        int64_t base = 0;
        for (const Part& part : op.parts) {
            const Weight& w = weights[(size_t)part.weight];
            const int64_t a = std::max(first, base) - base, b = std::min(last, base + w.panels()) - base;
            base += w.panels();
            if (a >= b) continue;
            float* sums = nullptr;
            if (w.zero) {
                sums = local.sums.get<float>((size_t)(kGemvRows * w.groups()));
                group_sums(w, x, ldx, (int)rows, sums);
            }
            int64_t ldy;
            float* y = output(part, ldy);
            if (whole) product_int8(w, ints, 0, rows, y, ldy, a, b);
            else if (halves && can_split(w)) gemv_split(w, halves, (int)rows, sums, y, ldy, a, b);
            else gemv(w, x, ldx, (int)rows, sums, scales, y, ldy, a, b);
        }
    });
    prefetch_weights(next, worker, kPrefetchBytes);
    worker.barrier();
}

void Model::linear_many(const Op& op, Worker& worker, Local& local) {
    const int64_t rows = op.outputs ? pass_.outputs : pass_.tokens;
    const int64_t k = op.dim, padded = round_up(k, kLanes), bytes = round_up(k, kByteAlign);
    const bool as_it_is = op.prologue == kPlainInput && op.order < 0 && op.quantize == kNoActivation;
    const bool whole = op.quantize == kInt8Activation;
    worker.share(rows, 8, [&](int64_t first, int64_t last) {
        const bool in_place = !bf16_ && !whole;
        float* own = in_place ? nullptr : local.rows.get<float>((size_t)(kGemvRows * padded));
        for (int64_t r = first; r < last; ++r) {
            const float* from = as_it_is && !in_place ? buffers_[op.x].row(r) : nullptr;
            if (!from) {
                float* row = in_place ? input_.floats() + r * padded : own;
                make_row(op, r, row, true, local);
                if (op.quantize != kNoActivation) scales_[(size_t)r] = scale_of(op, row);
                if (op.quantize == kE4m3Activation) quantize_e4m3(row, k, scales_[(size_t)r], row);
                from = row;
            }
            if (whole)
                quantize_int8(from, k, bytes, scales_[(size_t)r], (int8_t*)input_.data() + r * bytes, sums_[(size_t)r]);
            else if (bf16_) round_row(from, k, padded, (uint16_t*)input_.data() + r * padded);
        }
    });
    worker.barrier();
    int64_t blocks = 0;
    for (const Part& part : op.parts) blocks += (weights[(size_t)part.weight].panels() + kGemmPanels - 1) / kGemmPanels;
    const int64_t pieces = (rows + kTaskRows - 1) / kTaskRows;
    const float* scales = op.quantize == kNoActivation ? nullptr : scales_.data();
    const Int8Rows ints{(const int8_t*)input_.data(), bytes, scales_.data(), sums_.data()};
    worker.share(blocks * pieces, 1, [&](int64_t task, int64_t) {
        int64_t block = task / pieces;
        const int64_t m0 = task % pieces * kTaskRows, m1 = std::min(rows, m0 + kTaskRows);
        for (const Part& part : op.parts) {
            const Weight& w = weights[(size_t)part.weight];
            const int64_t own = (w.panels() + kGemmPanels - 1) / kGemmPanels;
            if (block >= own) {
                block -= own;
                continue;
            }
            int64_t ldy;
            float* y = output(part, ldy);
            const int64_t first = block * kGemmPanels, count = std::min<int64_t>(kGemmPanels, w.panels() - first);
            if (whole) product_int8(w, ints, m0, m1, y, ldy, first, first + count);
            else gemm(w, bf16_, input_.data(), padded, scales, m0, m1, y, ldy, first, (int)count, local.panels);
            return;
        }
    });
    worker.barrier();
}

}  // namespace tn
