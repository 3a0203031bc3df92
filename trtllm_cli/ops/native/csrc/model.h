// A loaded model: weights, activation buffers, the cache, and the program that a forward pass interprets.
#pragma once
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <vector>

#include "attention.h"
#include "eight_rows.h"
#include "gemv.h"
#include "pool.h"
#include "small.h"

namespace tn {

// What went wrong, for the caller to turn into its own errors; codes as in library.py.
struct Failure : std::runtime_error {
    int code;
    Failure(int code_, const std::string& message) : std::runtime_error(message), code(code_) {}
};
enum { kOk = 0, kInternal = 1, kBadInput = 2, kDoesNotFit = 3, kNoMemory = 4 };

// up to here a product is bound by reading weights and float32 activations cost nothing; bfloat16 tiles win earlier
constexpr int64_t kFewRows = 8, kFewRowsBf16 = 4;
// of what the next operation reads, while this one computes or waits
constexpr int64_t kPrefetchBytes = 65536, kPrefetchIdleBytes = 131072;

enum OpKind { kEmbedding = 0, kNorm = 1, kAddNorm = 2, kLinear = 3, kGatedOp = 4, kAttention = 5, kGather = 6 };
// What a linear does to make its input, so that no pass over memory and no barrier stands between the two.
enum Prologue { kPlainInput = 0, kNormInput = 1, kAddNormInput = 2, kGatedInput = 3 };

struct Part {
    int weight, out;  // out < 0: the logits
};

// Buffers and vectors are indices. Which fields mean something depends on the kind:
//   embedding  weight -> out                     norm      x -> out (vector, eps)
//   add_norm   x + y -> total, out (vector, eps) gated     x, y -> out (activation)
//   linear     prologue of x, y (total), then order and activation -> parts
//   gather     x -> out
//   attention  x, y, z = q, k, v -> out (attention, rotary table)
struct Op {
    int kind = 0, prologue = 0;
    int x = -1, y = -1, z = -1, total = -1, out = -1, weight = -1, vector = -1, activation = 0, rotary = -1;
    int order = -1;            // of a linear's inputs, an index into Model::orders: element i comes from order[i]
    int quantize = kNoActivation;  // how a linear's input is quantized
    float input_scale = 0;     // its static scale, 0: each row its own
    bool outputs = false;  // rows are wanted outputs, not tokens
    int64_t dim = 0;       // elements a row of the input
    float eps = 0;
    std::vector<Part> parts;
    AttentionShape attention;
};

struct Buffer {
    Pages pages;
    int64_t stride = 0;
    float* row(int64_t r) const { return pages.floats() + r * stride; }
};

struct Rotary {
    const float *cos, *sin;
    int64_t dim;
};

// A stretch of one segment that runs in the current pass.
struct Piece {
    int64_t slot, position, first, count;
};
// A unit of attention work: queries [query, query + count) of a piece; for a single query, chunk of the cache.
struct Task {
    int piece;
    int64_t query, count, chunk;
};

struct Pass {
    int64_t tokens = 0, outputs = 0;
    std::vector<int32_t> token_ids;
    std::vector<int64_t> gather;    // row of each wanted output
    std::vector<int> piece_of;      // of each token row
    std::vector<Piece> pieces;
    std::vector<Task> tasks;
    std::vector<int64_t> partial_of;  // first partial result of each piece, -1 without
    int64_t chunks = 0;             // partial results in use
    bool single = false;            // every piece is one query with one chunk
    float* logits = nullptr;
};

struct Local {
    PanelCache panels;
    Scratch attention, rows, bytes, whole, sums, halves;
};

struct Segment {
    int64_t slot, start, count, want;  // want: 0 none, 1 last, 2 all
};

class Model {
  public:
    Model(int threads, int64_t chunk, bool bf16, int64_t vocab);

    // construction, in any order before finish()
    std::vector<Weight> weights;
    std::vector<const float*> vectors;
    std::vector<int64_t> widths;
    std::vector<Rotary> rotaries;
    std::vector<const int32_t*> orders;
    std::vector<std::pair<const float*, const float*>> kv_scales;  // of keys and values of each layer
    std::vector<Op> ops;
    KvStore kv;
    void finish();

    // Segments' tokens one after another. Writes wanted logits [rows][vocab].
    void forward(const std::vector<Segment>& segments, const int32_t* tokens, float* logits);
    int64_t scratch_bytes() const;
    void poison();

    Pool pool;
    std::vector<int32_t> lengths;  // cached positions of each slot
    std::mutex mutex;

  private:
    void check(const std::vector<Segment>& segments, const int32_t* tokens) const;
    void plan_attention();
    void run_pass();
    void run_ops(Worker& worker);
    void linear(const Op& op, const Op* next, Worker& worker, Local& local);
    void linear_few(const Op& op, const Op* next, Worker& worker, Local& local);
    void linear_many(const Op& op, Worker& worker, Local& local);
    void attention(const Op& op, const Op* next, Worker& worker, Local& local);
    void prefetch_weights(const Op* next, const Worker& worker, int64_t bytes) const;
    void prefetch_cache(const Op* next, const Worker& worker, int64_t bytes) const;
    void make_row(const Op& op, int64_t r, float* out, bool keep_total, Local& local) const;
    float* output(const Part& part, int64_t& ldy) const;
    int64_t panels_of(const Op& op) const;

    int64_t chunk_, vocab_;
    bool bf16_;
    int64_t input_stride_ = 0;
    Pages input_;     // inputs of the current linear, shared by the threads
    std::vector<float> scales_;  // of its rows, where they are quantized
    std::vector<int32_t> sums_;
    Pages partials_;  // of attention over several chunks
    std::vector<Buffer> buffers_;
    std::vector<std::unique_ptr<Local>> locals_;
    Pass pass_;
};

}  // namespace tn
