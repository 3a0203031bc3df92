// One pass: every thread walks the program, sharing each operation's work and meeting at barriers.
#include <algorithm>

#include "model.h"

namespace tn {

namespace {


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
                    float* out = buffers_[op.out].row(r);
                    const bool ordered = op.order >= 0;
                    float* row = ordered ? local.whole.get<float>((size_t)op.dim) : out;
                    embedding_row(weights[(size_t)op.weight], pass_.token_ids[(size_t)r], row);
                    for (int64_t i = 0; ordered && i < op.dim; ++i) out[orders[(size_t)op.order][i]] = row[i];
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

void Model::attention(const Op& op, const Op* next, Worker& worker, Local& local) {
    AttentionShape s = op.attention;
    const Rotary& rotary = rotaries[(size_t)op.rotary];
    s.cos = rotary.cos;
    s.sin = rotary.sin;
    s.rotary = rotary.dim;
    if (!kv_scales.empty()) {
        s.k_scale = kv_scales[(size_t)s.layer].first;
        s.v_scale = kv_scales[(size_t)s.layer].second;
    }
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
                value_factor(s, kv, head / group), out.row(piece.first) + head * s.head_dim);
    });
    worker.barrier();
}

}  // namespace tn
