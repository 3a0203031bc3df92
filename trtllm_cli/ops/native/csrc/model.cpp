// Splitting a batch into passes of bounded size.
#include "model.h"

#include <algorithm>

namespace tn {

Model::Model(int threads, int64_t chunk, bool bf16, int64_t vocab)
    : pool(threads), chunk_(chunk < 1 ? 1 : chunk), vocab_(vocab), bf16_(bf16 && kHasBf16) {}

void Model::finish() {
    kv.allocate();
    int64_t widest = 0;
    for (const Op& op : ops)
        if (op.kind == kLinear) widest = std::max(widest, op.dim);
    input_stride_ = (widest + kLanes - 1) / kLanes * kLanes + kLanes;
    input_ = Pages((size_t)(chunk_ * input_stride_) * sizeof(float));
    scales_.assign((size_t)chunk_, 0.0f);
    sums_.assign((size_t)chunk_, 0);
    if (kv.element() == 1 && (int64_t)kv_scales.size() != kv.layers)
        throw Failure(kInternal, "a quantized cache needs scales for each layer");
    for (int64_t width : widths) {
        Buffer b;
        b.stride = (width + kLanes - 1) / kLanes * kLanes;
        b.pages = Pages((size_t)(chunk_ * b.stride) * sizeof(float));
        buffers_.push_back(std::move(b));
    }
    for (int i = 0; i < pool.threads(); ++i) locals_.push_back(std::make_unique<Local>());
    lengths.assign((size_t)kv.slots, 0);
}

int64_t Model::scratch_bytes() const {
    int64_t total = (int64_t)(input_.bytes() + partials_.bytes());
    for (const auto& b : buffers_) total += (int64_t)b.pages.bytes();
    for (const auto& l : locals_)
        total += (int64_t)(l->panels.data.bytes() + l->panels.plain.bytes() + l->attention.bytes() + l->rows.bytes() +
                           l->bytes.bytes() + l->whole.bytes() + l->sums.bytes() + l->halves.bytes());
    return total;
}

void Model::poison() {
    for (auto& b : buffers_) std::memset(b.pages.data(), 0xff, b.pages.bytes());
    std::memset(input_.data(), 0xff, input_.bytes());
}

void Model::check(const std::vector<Segment>& segments, const int32_t* tokens) const {
    std::vector<char> used((size_t)kv.slots, 0);
    size_t index = 0;
    for (const Segment& s : segments) {
        const std::string who = "segment " + std::to_string(index++);
        if (s.slot < 0 || s.slot >= kv.slots)
            throw Failure(kBadInput, "SLOT_OUT_OF_RANGE|" + who + " names slot " + std::to_string(s.slot) + " of " +
                                         std::to_string(kv.slots));
        if (used[(size_t)s.slot]++)
            throw Failure(kBadInput, "SLOT_REPEATED|" + who + " names slot " + std::to_string(s.slot) +
                                         ", which an earlier segment of the same batch uses");
        if (s.count <= 0) throw Failure(kBadInput, "SEGMENT_EMPTY|" + who + " has no tokens");
        if (s.start < 0 || s.start > lengths[(size_t)s.slot])
            throw Failure(kBadInput, "POSITION_GAP|" + who + " starts at position " + std::to_string(s.start) +
                                         " of slot " + std::to_string(s.slot) + ", which holds " +
                                         std::to_string(lengths[(size_t)s.slot]) + " positions");
        if (s.count > kv.context || s.start > kv.context - s.count)
            throw Failure(kDoesNotFit, "CONTEXT_EXCEEDED|" + who + " needs " + std::to_string(s.start + s.count) +
                                           " positions and the engine's context is " + std::to_string(kv.context));
        for (int64_t i = 0; i < s.count; ++i) {
            if (tokens[i] < 0 || tokens[i] >= vocab_)
                throw Failure(kBadInput, "TOKEN_OUT_OF_RANGE|" + who + " has token " + std::to_string(tokens[i]) +
                                             " at index " + std::to_string(i) + ", outside the vocabulary of " +
                                             std::to_string(vocab_));
        }
        tokens += s.count;
    }
}

void Model::forward(const std::vector<Segment>& segments, const int32_t* tokens, float* logits) {
    check(segments, tokens);
    size_t current = 0;
    int64_t done = 0;  // tokens of the current segment that earlier passes took
    while (current < segments.size()) {
        Pass& p = pass_;
        p.tokens = 0;
        p.token_ids.clear();
        p.gather.clear();
        p.piece_of.clear();
        p.pieces.clear();
        p.logits = logits;
        while (current < segments.size() && p.tokens < chunk_) {
            const Segment& s = segments[current];
            const int64_t count = std::min(chunk_ - p.tokens, s.count - done);
            const int piece = (int)p.pieces.size();
            p.pieces.push_back({s.slot, s.start + done, p.tokens, count});
            for (int64_t i = 0; i < count; ++i) {
                p.token_ids.push_back(tokens[i]);
                p.piece_of.push_back(piece);
                if (s.want == 2 || (s.want == 1 && done + i + 1 == s.count)) p.gather.push_back(p.tokens + i);
            }
            // until the pass has run, positions from here on are being overwritten
            lengths[(size_t)s.slot] = (int32_t)(s.start + done);
            tokens += count;
            p.tokens += count;
            done += count;
            if (done == s.count) {
                ++current;
                done = 0;
            }
        }
        p.outputs = (int64_t)p.gather.size();
        run_pass();
        for (const Piece& piece : p.pieces) lengths[(size_t)piece.slot] = (int32_t)(piece.position + piece.count);
        logits += p.outputs * vocab_;
    }
}

void Model::plan_attention() {
    Pass& p = pass_;
    p.tasks.clear();
    p.partial_of.clear();
    p.chunks = 0;
    p.single = true;
    int64_t group = 1, heads = 1;
    for (const Op& op : ops) {
        if (op.kind != kAttention) continue;
        group = std::max(group, op.attention.heads / op.attention.kv_heads);
        heads = std::max(heads, op.attention.heads);
    }
    const int64_t queries = std::max<int64_t>(1, 96 / group);
    for (size_t i = 0; i < p.pieces.size(); ++i) {
        const Piece& piece = p.pieces[i];
        if (piece.count == 1) {
            const int64_t chunks = piece.position / kChunk + 1;
            p.partial_of.push_back(chunks > 1 ? p.chunks : -1);
            for (int64_t c = 0; c < chunks; ++c) p.tasks.push_back({(int)i, 0, 1, c});
            if (chunks > 1) {
                p.chunks += chunks;
                p.single = false;
            }
        } else {
            p.single = false;
            p.partial_of.push_back(-1);
            // the last queries see most: longest work first keeps the threads level at the end
            for (int64_t q = (piece.count - 1) / queries * queries; q >= 0; q -= queries)
                p.tasks.push_back({(int)i, q, std::min(queries, piece.count - q), 0});
        }
    }
    const size_t bytes = (size_t)(p.chunks * heads * (kv.width + 2)) * sizeof(float);
    if (bytes > partials_.bytes()) partials_ = Pages(bytes * 2);
}

void Model::run_pass() {
    plan_attention();
    const std::function<void(Worker&)> body = [this](Worker& worker) { run_ops(worker); };
    pool.run(body);
}

}  // namespace tn
