// How blocks of the decoder layers' kernel hand rows to each other: each word says itself that it has come.
//
// A word is 64 bits, written and read at once: two values (or a float32) and a tag that no earlier layer or launch has
// used. Whoever needs it reads it until the tag is there: no counter, no fence, and one trip through the L2 cache
// between two blocks (the LL protocol of collective libraries). A row is written again one layer later, by blocks that
// needed, through the rows in between, all that the row's readers have made of it: nobody still reads it then.
#pragma once

#include "decode_layer.hpp"
#include "ptx.cuh"

namespace trtllm::decode_layer {

// The start of the workspace.
struct Counters {
    uint32_t tag;   // the last one used
    uint32_t left;  // blocks that have ended
};

class Exchange {
    static constexpr uint64_t kMostNanoseconds = 5'000'000'000;
    int32_t* const failed;
    volatile int* const lost;  // in shared memory: somebody has given up

  public:
    uint32_t tag;

    __device__ __forceinline__ Exchange(int32_t* failed_word, int* lost_word, uint32_t first)
        : failed(failed_word), lost(lost_word), tag(first) {}

    // `ahead`: for a later layer than this one.
    __device__ __forceinline__ void put(uint64_t* to, uint32_t value, uint32_t ahead = 0) const {
        const uint64_t word = uint64_t(tag + ahead) << 32 | value;
        asm volatile("st.relaxed.gpu.global.b64 [%0], %1;" ::"l"(to), "l"(word) : "memory");
    }
    // False where the word is an older one.
    __device__ __forceinline__ bool get(const uint64_t* from, uint32_t& value) const {
        uint64_t word;
        asm volatile("ld.relaxed.gpu.global.b64 %0, [%1];" : "=l"(word) : "l"(from) : "memory");
        value = uint32_t(word);
        return uint32_t(word >> 32) == tag;
    }
    // Two words, aligned to 16 bytes.
    __device__ __forceinline__ bool get_two(const uint64_t* from, uint32_t& first, uint32_t& second) const {
        uint64_t one, other;
        asm volatile("ld.relaxed.gpu.global.v2.b64 {%0, %1}, [%2];" : "=l"(one), "=l"(other) : "l"(from) : "memory");
        first = uint32_t(one), second = uint32_t(other);
        return uint32_t(one >> 32) == tag && uint32_t(other >> 32) == tag;
    }
    // Eight values of a row.
    __device__ __forceinline__ bool get_eight(const uint64_t* row, int chunk, uint4& v) const {
        const bool low = get_two(row + chunk * 4, v.x, v.y);
        return get_two(row + chunk * 4 + 2, v.z, v.w) && low;
    }

    // Calls `read` until it says that all has come. After some seconds in vain somebody does not run, and nobody waits
    // for anything any more.
    template <typename Read>
    __device__ __forceinline__ void until(Read read) const {
        unsigned spins = 0;
        uint64_t began = 0, now;
        while (!read()) {
            if (++spins % 256 != 0) continue;
            asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
            if (began == 0) began = now;
            if (*lost || *static_cast<volatile int32_t*>(failed) != 0 || now - began > kMostNanoseconds) {
                *lost = 1;
                *static_cast<volatile int32_t*>(failed) = 1;
                break;
            }
        }
    }
};

// The last block to end makes the tags of this launch old ones.
__device__ __forceinline__ void leave(Counters* counters, uint32_t used, uint32_t blocks) {
    if (threadIdx.x != 0) return;
    if (atomicAdd(&counters->left, 1u) + 1 == blocks) counters->left = 0, counters->tag = used;
}

}  // namespace trtllm::decode_layer
