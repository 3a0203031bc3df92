// One pass: every thread walks the program, sharing each operation's work and meeting at barriers.
#include <algorithm>

#include "model.h"

namespace tn {

namespace {

constexpr int64_t kGemmTaskRows = 96;
// up to here a product is bound by reading weights and float32 activations cost nothing; bfloat16 tiles win earlier
constexpr int64_t kFewRows = 8, kFewRowsBf16 = 4;
constexpr int64_t kPrefetchBytes = 65536, kPrefetchIdleBytes = 131072;

void prefetch_range(const char* at, int64_t bytes) {
    for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(at + i, 0, 2);
}

}  // namespace

void Model::run_ops(Worker& worker) {
    Local& local = *locals_[(size_t)worker.index];
    for (const Op& op : ops) {
        const int64_t rows = op.outputs ? pass_.outputs : pass_.tokens;
        const Op* next = &op + 1 < ops.data() + ops.size() ? &op + 1 : nullptr;
        if (rows == 0) return;  // nobody wants outputs of this pass: only the cache had to be filled
        const auto each_row = [&](auto&& body) {
            const int64_t grain = rows < 8 ? 1 : 4;
            worker.share(rows, grain, [&](int64_t first, int64_t last) {
                for (int64_t r = first; r < last; ++r) body(r);
            });
            worker.barrier();
        };
        switch (op.kind) {
            case kEmbedding:
                each_row([&](int64_t r) {
                    embedding_row(weights[(size_t)op.weight], pass_.token_ids[(size_t)r], buffers_[op.out].row(r));
                });
                break;
            case kNorm:
                each_row([&](int64_t r) {
                    rms_norm(buffers_[op.x].row(r), vectors[op.vector], op.eps, op.dim, buffers_[op.out].row(r));
                });
                break;
            case kAddNorm:
                each_row([&](int64_t r) {
                    add_rms_norm(buffers_[op.x].row(r), buffers_[op.y].row(r), buffers_[op.total].row(r),
                                 vectors[op.vector], op.eps, op.dim, buffers_[op.out].row(r));
                });
                break;
            case kGatedOp:
                each_row([&](int64_t r) {
                    gated(buffers_[op.x].row(r), buffers_[op.y].row(r), op.activation, op.dim, buffers_[op.out].row(r));
                });
                break;
            case kGather:
                each_row([&](int64_t r) {
                    std::memcpy(buffers_[op.out].row(r), buffers_[op.x].row(pass_.gather[(size_t)r]),
                                sizeof(float) * (size_t)op.dim);
                });
                break;
            case kLinear: linear(op, next, worker, local); break;
            case kAttention: attention(op, next, worker, local); break;
        }
    }
}

// The input of a linear, row r, as float32 into `out`.
void Model::make_row(const Op& op, int64_t r, float* out, bool keep_total) const {
    switch (op.prologue) {
        case kNormInput: rms_norm(buffers_[op.x].row(r), vectors[op.vector], op.eps, op.dim, out); break;
        case kAddNormInput:
            add_rms_norm(buffers_[op.x].row(r), buffers_[op.y].row(r),
                         keep_total && op.total >= 0 ? buffers_[op.total].row(r) : nullptr,
                         vectors[op.vector], op.eps, op.dim, out);
            break;
        case kGatedInput:
            gated(buffers_[op.x].row(r), buffers_[op.y].row(r), op.activation, op.dim, out);
            break;
        default: std::memcpy(out, buffers_[op.x].row(r), sizeof(float) * (size_t)op.dim);
    }
}

// Asks for the first of the weights that this thread will read in `next`, so that they come while it computes or waits.
void Model::prefetch_weights(const Op* next, const Worker& worker, int64_t bytes) const {
    if (!next || next->kind != kLinear) return;
    int64_t panels = 0;
    for (const Part& part : next->parts) panels += weights[(size_t)part.weight].panels();
    int64_t first = panels * worker.index / worker.count, last = panels * (worker.index + 1) / worker.count;
    for (const Part& part : next->parts) {
        const Weight& w = weights[(size_t)part.weight];
        if (first < w.panels() && first < last) {
            const int64_t count = std::min(w.panels(), last) - first, take = std::min(bytes, count * w.panel_bytes());
            prefetch_range(w.panel(first), take);
            bytes -= take;
            if (w.format == kInt4) {
                const int64_t a = first * w.groups() * (w.half_scale ? 32 : 64);
                prefetch_range((const char*)w.scale + a, std::min<int64_t>(take / 8, 8192));
            }
        }
        if (bytes <= 0) return;
        first = std::max<int64_t>(0, first - w.panels());
        last -= w.panels();
    }
}

// Asks for the keys and values of this thread's share of a decoding step.
void Model::prefetch_cache(const Op* next, const Worker& worker, int64_t bytes) const {
    if (!next || next->kind != kAttention || !pass_.single) return;
    const AttentionShape& s = next->attention;
    const int64_t tasks = (int64_t)pass_.tasks.size() * s.kv_heads;
    for (int64_t i = tasks * worker.index / worker.count; i < tasks * (worker.index + 1) / worker.count; ++i) {
        const Piece& piece = pass_.pieces[(size_t)pass_.tasks[(size_t)(i / s.kv_heads)].piece];
        const int64_t take = std::min(bytes / 2, (piece.position + 1) * kv.width * kv.element());
        prefetch_range(kv.keys(piece.slot, s.layer, i % s.kv_heads), take);
        prefetch_range(kv.values(piece.slot, s.layer, i % s.kv_heads), take);
        bytes -= 2 * take;
        if (bytes < 128) return;
    }
}

void Model::linear(const Op& op, const Op* next, Worker& worker, Local& local) {
    const int64_t rows = op.outputs ? pass_.outputs : pass_.tokens;
    const int64_t k = op.dim, padded = (k + kLanes - 1) / kLanes * kLanes;
    int64_t panels = 0;
    for (const Part& part : op.parts) panels += weights[(size_t)part.weight].panels();
    const auto output = [&](const Part& part, int64_t& ldy) {
        ldy = part.out < 0 ? vocab_ : buffers_[part.out].stride;
        return part.out < 0 ? pass_.logits : buffers_[part.out].row(0);
    };
    if (rows <= (bf16_ ? kFewRowsBf16 : kFewRows)) {
        const float* x = op.prologue == kPlainInput ? buffers_[op.x].row(0) : nullptr;
        int64_t ldx = op.prologue == kPlainInput ? buffers_[op.x].stride : padded;
        if (!x && rows <= 2) {
            // cheaper to do everywhere than to wait for each other; one thread keeps the sum
            float* own = local.rows.get<float>((size_t)(kGemvRows * padded));
            for (int64_t r = 0; r < rows; ++r) make_row(op, r, own + r * padded, worker.index == 0);
            x = own;
        } else if (!x) {
            worker.share(rows, 1, [&](int64_t r, int64_t) { make_row(op, r, input_.floats() + r * padded, true); });
            worker.barrier();
            x = input_.floats();
        }
        prefetch_cache(next, worker, 2 * kPrefetchIdleBytes);
        // the bfloat16 mode reads int4 weights as bfloat16, against activations in two parts
        uint32_t* halves = nullptr;
        for (const Part& part : op.parts) {
            if (halves || !bf16_ || !can_split(weights[(size_t)part.weight])) continue;
            halves = local.halves.get<uint32_t>((size_t)(kGemvRows * k));
            split(x, ldx, (int)rows, k, halves);
        }
        worker.share(panels, 4, [&](int64_t first, int64_t last) {
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
                if (halves && can_split(w)) gemv_split(w, halves, (int)rows, sums, y, ldy, a, b);
                else gemv(w, x, ldx, (int)rows, sums, y, ldy, a, b);
            }
        });
        prefetch_weights(next, worker, kPrefetchBytes);
        worker.barrier();
        return;
    }
    worker.share(rows, 8, [&](int64_t first, int64_t last) {
        if (!bf16_) {
            for (int64_t r = first; r < last; ++r) make_row(op, r, input_.floats() + r * padded, true);
            return;
        }
        float* own = local.rows.get<float>((size_t)(kGemvRows * padded));
        for (int64_t r = first; r < last; ++r) {
            const float* from = own;
            if (op.prologue == kPlainInput) from = buffers_[op.x].row(r);
            else make_row(op, r, own, true);
            round_row(from, k, padded, (uint16_t*)input_.data() + r * padded);
        }
    });
    worker.barrier();
    int64_t blocks = 0;
    for (const Part& part : op.parts) blocks += (weights[(size_t)part.weight].panels() + kGemmPanels - 1) / kGemmPanels;
    const int64_t pieces = (rows + kGemmTaskRows - 1) / kGemmTaskRows;
    worker.share(blocks * pieces, 1, [&](int64_t task, int64_t) {
        int64_t block = task / pieces;
        const int64_t m0 = task % pieces * kGemmTaskRows, m1 = std::min(rows, m0 + kGemmTaskRows);
        for (const Part& part : op.parts) {
            const Weight& w = weights[(size_t)part.weight];
            const int64_t own = (w.panels() + kGemmPanels - 1) / kGemmPanels;
            if (block >= own) {
                block -= own;
                continue;
            }
            int64_t ldy;
            float* y = output(part, ldy);
            const int64_t first = block * kGemmPanels;
            gemm(w, bf16_, input_.data(), padded, m0, m1, y, ldy, first,
                 (int)std::min<int64_t>(kGemmPanels, w.panels() - first), local.panels);
            return;
        }
    });
    worker.barrier();
}

void Model::attention(const Op& op, const Op* next, Worker& worker, Local& local) {
    AttentionShape s = op.attention;
    const Rotary& rotary = rotaries[(size_t)op.rotary];
    s.cos = rotary.cos;
    s.sin = rotary.sin;
    s.rotary = rotary.dim;
    const Buffer &q = buffers_[op.x], &k = buffers_[op.y], &v = buffers_[op.z], &out = buffers_[op.out];
    const int64_t group = s.heads / s.kv_heads, lds = kv.width + 2;
    const auto prepare = [&](int64_t r, int64_t head) {
        const Piece& piece = pass_.pieces[(size_t)pass_.piece_of[(size_t)r]];
        prepare_heads(s, kv, piece.slot, head, piece.position + r - piece.first, q.row(r), k.row(r), v.row(r));
    };
    if (!pass_.single) {
        worker.share(pass_.tokens * s.kv_heads, 4 * s.kv_heads, [&](int64_t first, int64_t last) {
            for (int64_t i = first; i < last; ++i) prepare(i / s.kv_heads, i % s.kv_heads);
        });
        worker.barrier();
    }
    // attention computes while the memory idles
    if (pass_.tokens <= kFewRows) prefetch_weights(next, worker, kPrefetchIdleBytes);
    const int64_t tasks = (int64_t)pass_.tasks.size();
    worker.share(tasks * s.kv_heads, 1, [&](int64_t index, int64_t) {
        const Task& task = pass_.tasks[(size_t)(index / s.kv_heads)];
        const int64_t head = index % s.kv_heads;
        const Piece& piece = pass_.pieces[(size_t)task.piece];
        const int64_t row = piece.first + task.query, position = piece.position + task.query;
        if (piece.count > 1) {
            attend_many(s, kv, bf16_, piece.slot, head, position, task.count, q.row(row), q.stride, out.row(row),
                        out.stride, local.attention);
            return;
        }
        if (pass_.single) prepare(row, head);
        const int64_t low = s.window && position + 1 > s.window ? position + 1 - s.window : 0;
        const int64_t first = std::max(low, task.chunk * kChunk);
        const int64_t last = std::min(position + 1, (task.chunk + 1) * kChunk);
        const int64_t base = pass_.partial_of[(size_t)task.piece];
        float* partial = base < 0 ? nullptr : partials_.floats() + ((base + task.chunk) * s.heads + head * group) * lds;
        if (first >= last) {  // the window has left this chunk
            for (int64_t h = 0; h < group; ++h) {
                std::memset(partial + h * lds, 0, sizeof(float) * (size_t)lds);
                partial[h * lds + kv.width] = -1e30f;
            }
            return;
        }
        attend_one(s, kv, piece.slot, head, first, last, q.row(row) + head * group * s.head_dim,
                   out.row(row) + head * group * s.head_dim, partial, local.attention);
    });
    worker.barrier();
    if (pass_.chunks == 0) return;
    worker.share((int64_t)pass_.pieces.size() * s.heads, 1, [&](int64_t index, int64_t) {
        const Piece& piece = pass_.pieces[(size_t)(index / s.heads)];
        const int64_t base = pass_.partial_of[(size_t)(index / s.heads)], head = index % s.heads;
        if (base < 0) return;
        combine(kv, partials_.floats() + (base * s.heads + head) * lds, s.heads * lds, piece.position / kChunk + 1,
                out.row(piece.first) + head * s.head_dim);
    });
    worker.barrier();
}

}  // namespace tn
