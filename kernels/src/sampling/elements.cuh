// Reading a block's part of a row, and visiting its elements afterwards.
#pragma once

#include "argmax.cuh"
#include "row.cuh"

namespace trtllm::sampling {

// Kept: the block's part lies in shared memory once it is read; else it is read again from where it comes.
template <typename T, bool Kept>
struct Elements {
    static constexpr int V = 16 / int(sizeof(T));
    static constexpr int kAhead = 4;  // vectors of each thread on their way together
    struct alignas(4 * sizeof(T)) Four {
        T at[4];
    };
    struct alignas(2 * V) Counts {
        int16_t at[V];
    };

    const trtllm_sampling_params& p;
    const T* logits;  // the row
    Blocks blocks;
    Part part;

    __device__ __forceinline__ float element(int id) const {
        if (id < 0 || id >= p.vocab) return -INFINITY;
        const Source& source = blocks.shared.source;
        return source.penalized(float(logits[id]), source.counts == nullptr ? int16_t(0) : source.counts[id]);
    }
    // Four slots from `slot`, a multiple of 4.
    __device__ __forceinline__ float4 fetch(int slot) const {
        if constexpr (Kept) return *reinterpret_cast<const float4*>(part.values + slot);
        const int id = part.first_id + slot;
        if (blocks.shared.source.counts == nullptr && id >= 0 && id + 4 <= p.vocab) {
            const auto four = *reinterpret_cast<const Four*>(logits + id);
            return make_float4(float(four.at[0]) + 0.0f, float(four.at[1]) + 0.0f, float(four.at[2]) + 0.0f,
                               float(four.at[3]) + 0.0f);
        }
        return make_float4(element(id), element(id + 1), element(id + 2), element(id + 3));
    }
    // Those elements that this thread has read, in order of id.
    template <typename Each>
    __device__ __forceinline__ void each(const Each& visit) const {
#pragma unroll 1
        for (int vector = int(threadIdx.x) * V; vector < part.slots; vector += V * kThreads) {
#pragma unroll 1
            for (int slot = vector; slot < vector + V; slot += 4) {
                const float4 four = fetch(slot);
                visit(four.x, slot);
                visit(four.y, slot + 1);
                visit(four.z, slot + 2);
                visit(four.w, slot + 3);
            }
        }
    }

    // Reads this block's part of the row. Gives the largest element, NaN where there is one. The first vectors are on
    // their way before the block meets to know what is asked of the row.
    __device__ float read() const {
        LogitPack<T, V> raw[kAhead];
        load(raw, int(threadIdx.x));
        __syncthreads();
        if (blocks.shared.source.counts != nullptr) return read_penalized();
        float best = -INFINITY;
#pragma unroll 1
        for (int begin = int(threadIdx.x); begin * V < part.slots; begin += kAhead * kThreads) {
#pragma unroll
            for (int n = 0; n < kAhead; ++n) {
                const int vector = begin + n * kThreads;
                if (vector * V < part.slots) best = larger(best, keep(plain(raw[n], vector), vector));
            }
            load(raw, begin + kAhead * kThreads);
        }
        return best;
    }
    // The same for a row with penalties, where few elements have one.
    __device__ float read_penalized() const {
        const Source& source = blocks.shared.source;
        const bool apart = reinterpret_cast<uintptr_t>(source.counts + part.first_id) % sizeof(Counts) != 0;
        struct Both {
            LogitPack<T, V> raw;
            Counts seen;
        };
        const auto load_both = [&](int vector) {
            const int id = part.first_id + vector * V;
            Both both = {};
            if (vector * V >= part.slots || !inside(id)) return both;
            both.raw = *reinterpret_cast<const LogitPack<T, V>*>(logits + id);
            if (!apart) both.seen = *reinterpret_cast<const Counts*>(source.counts + id);
            return both;
        };
        float best = -INFINITY;
        Both next = load_both(int(threadIdx.x)), after = load_both(int(threadIdx.x) + kThreads);
#pragma unroll 1
        for (int vector = int(threadIdx.x); vector * V < part.slots; vector += kThreads) {
            Both both = next;
            next = after;
            after = load_both(vector + 2 * kThreads);
            const int id = part.first_id + vector * V;
            Vector x = plain(both.raw, vector);
            if (apart || !inside(id)) {
#pragma unroll
                for (int i = 0; i < V; ++i) {
                    if (id + i >= 0 && id + i < p.vocab) both.seen.at[i] = source.counts[id + i];
                }
            }
            bool any = false;
#pragma unroll
            for (int i = 0; i < V; ++i) any |= both.seen.at[i] != 0;
            if (any) {
#pragma unroll
                for (int i = 0; i < V; ++i) x.at[i] = source.penalized(x.at[i], both.seen.at[i]);
            }
            best = larger(best, keep(x, vector));
        }
        return best;
    }
    __device__ __forceinline__ bool inside(int id) const { return id >= 0 && id + V <= p.vocab; }
    __device__ __forceinline__ void load(LogitPack<T, V> (&raw)[kAhead], int begin) const {
#pragma unroll
        for (int n = 0; n < kAhead; ++n) {
            const int vector = begin + n * kThreads, id = part.first_id + vector * V;
            if (vector * V < part.slots && inside(id)) raw[n] = *reinterpret_cast<const LogitPack<T, V>*>(logits + id);
        }
    }
    struct Vector {
        float at[V];
    };
    __device__ __forceinline__ Vector plain(const LogitPack<T, V>& raw, int vector) const {
        const int id = part.first_id + vector * V;
        Vector x;
        if (inside(id)) {
#pragma unroll
            for (int i = 0; i < V; ++i) x.at[i] = raw.at(i) + 0.0f;
        } else {  // at an end of the row
#pragma unroll
            for (int i = 0; i < V; ++i) {
                x.at[i] = id + i >= 0 && id + i < p.vocab ? float(logits[id + i]) + 0.0f : -INFINITY;
            }
        }
        return x;
    }
    __device__ __forceinline__ float keep(const Vector& x, int vector) const {
        float top = x.at[0];
#pragma unroll
        for (int i = 1; i < V; ++i) top = larger(top, x.at[i]);
        if constexpr (Kept) {
#pragma unroll
            for (int i = 0; i < V; i += 4) {
                *reinterpret_cast<float4*>(part.values + vector * V + i) =
                    make_float4(x.at[i], x.at[i + 1], x.at[i + 2], x.at[i + 3]);
            }
        }
        return top;
    }

    // In order of id, the first element whose measure, added to those before it, exceeds the target; `target_of` makes it
    // from the whole sum, which is returned. `give` is called with value and id by one thread of the cluster. `plainly`
    // measures the same at less cost, where `plain`.
    template <typename Measure, typename Plainly, typename Target, typename Give>
    __device__ uint64_t locate(const Measure& measure, bool plain, const Plainly& plainly, const Target& target_of,
                               const Give& give) {
        const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32;
        const int segment = part.slots / kWarps, start = warp * segment;
        const auto sum_of = [&](int slot) {
            const float4 four = fetch(slot);
            return measure(four.x, slot) + measure(four.y, slot + 1) + measure(four.z, slot + 2) +
                   measure(four.w, slot + 3);
        };
        uint64_t sum = 0;
        if (plain) {
#pragma unroll 1
            for (int slot = start + lane * 4; slot < start + segment; slot += 128) {
                const float4 four = fetch(slot);
                sum += plainly(four.x) + plainly(four.y) + plainly(four.z) + plainly(four.w);
            }
        } else {
#pragma unroll 1
            for (int slot = start + lane * 4; slot < start + segment; slot += 128) sum += sum_of(slot);
        }
        sum = Sum::of(sum);
        uint64_t* words = blocks.next_words();
        if (lane == 0) words[warp] = sum;
        __syncthreads();
        const uint64_t word = lane < kWarps ? words[lane] : 0;
        uint64_t before = Sum::of(lane < warp ? word : 0), total = Sum::of(word);
        if (blocks.spread()) {
            const uint64_t theirs = blocks.exchange(total);
            total = Sum::of(theirs);
            before += Sum::of(lane < blocks.rank ? theirs : 0);
        }
        const uint64_t target = target_of(total);
        if (target < before || target >= before + sum) return total;  // not in this warp's elements
        uint64_t left = target - before;
#pragma unroll 1
        for (int slot = start + lane * 4; slot < start + segment; slot += 128) {
            const uint64_t mine = sum_of(slot);
            const uint64_t row = Sum::of(mine);
            if (left >= row) {
                left -= row;
                continue;
            }
            const uint64_t running = scan_warp(mine);
            if (running > left && running - mine <= left) {
                const float4 four = fetch(slot);
                const float x[4] = {four.x, four.y, four.z, four.w};
                uint64_t passed = running - mine;
                int at = 0;
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    passed += measure(x[i], slot + i);
                    at += passed <= left;
                }
                give(at == 0 ? x[0] : at == 1 ? x[1] : at == 2 ? x[2] : x[3], part.first_id + slot + at);
            }
            break;
        }
        return total;
    }
};

}  // namespace trtllm::sampling
