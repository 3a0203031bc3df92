// A warp's stripe of one stage on Hopper: from shared memory to the first operand of wgmma. Everything a stage needs
// comes by a few wide loads, and the group's size is known to the compiler: what is left between two products is three
// or four instructions a register.
#pragma once

#include "weight_only_tile.cuh"

namespace trtllm::weight_only {

template <typename Word>
__device__ __forceinline__ Word load_shared(uint32_t at) {
    Word v;
    if constexpr (sizeof(Word) == 16) {
        asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(at));
    } else if constexpr (sizeof(Word) == 8) {
        asm volatile("ld.shared.v2.u32 {%0,%1}, [%2];" : "=r"(v.x), "=r"(v.y) : "r"(at));
    } else if constexpr (sizeof(Word) == 4) {
        asm volatile("ld.shared.u32 %0, [%1];" : "=r"(v) : "r"(at));
    } else {
        asm volatile("ld.shared.u16 %0, [%1];" : "=h"(v) : "r"(at));
    }
    return v;
}

/// `Shift`: log2 of (group / 32), of int4. `Scaled`: fragments are weights, else whole numbers that `factor` scales.
template <typename T, Weight kWeight, int Shift, bool Scaled>
struct Stripe;

template <typename T, int Shift, bool Scaled>
struct Stripe<T, Weight::kInt4, Shift, Scaled> {
    static constexpr int kGroups = 4 >> Shift;  // of a stage
    // as many groups' scales at a time; `factor` is asked for when the next half has come
    static constexpr int kHeld = Scaled && kGroups == 4 ? 2 : kGroups;
    uint4 low, high;                 // rows g and g + 8
    uint32_t scales[kHeld];          // float16, of the two rows
    uint32_t zeros[(kHeld + 1) / 2]; // bytes, of the two rows
    uint32_t scale[2];               // of the group in use, each twice
    uint32_t minus_zero[2];          // -(kBase + zero), each twice
    uint32_t at, scales_at, zeros_at;

    __device__ __forceinline__ Stripe(uint32_t first, bool has_zero, int lane)
        : at(first + lane * 16),
          scales_at(first + 1024 + lane / 4 * (4 * kGroups)),
          zeros_at(has_zero ? first + 1024 + 32 * kGroups + lane / 4 * (2 * kGroups) : 0) {
        asm volatile("" : "+r"(at), "+r"(scales_at), "+r"(zeros_at));  // else they are computed anew for every stage
        minus_zero[0] = minus_zero[1] = kNegative | 0x00400040;  // 8
    }
    /// Half `Half` of a stage's inputs (the weights all come with the first), `offset` bytes from the first slot's.
    template <int Half>
    __device__ __forceinline__ void load(uint32_t offset) {
        if constexpr (Half == 0) {
            low = load_shared<uint4>(at + offset);
            high = load_shared<uint4>(at + offset + 512);
        }
        if constexpr (Half == 1 && kHeld == kGroups) return;
        const uint32_t scales_from = scales_at + offset + Half * 8, zeros_from = zeros_at + offset + Half * 4;
        if constexpr (kHeld == 4) {
            const uint4 v = load_shared<uint4>(scales_from);
            scales[0] = v.x, scales[1] = v.y, scales[2] = v.z, scales[3] = v.w;
        } else if constexpr (kHeld == 2) {
            const uint2 v = load_shared<uint2>(scales_from);
            scales[0] = v.x, scales[1] = v.y;
        } else {
            scales[0] = load_shared<uint32_t>(scales_from);
        }
        if (zeros_at == 0) return;
        if constexpr (kHeld == 4) {
            const uint2 v = load_shared<uint2>(zeros_from);
            zeros[0] = v.x, zeros[1] = v.y;
        } else if constexpr (kHeld == 2) {
            zeros[0] = load_shared<uint32_t>(zeros_from);
        } else {
            zeros[0] = load_shared<uint16_t>(zeros_from);
        }
    }
    /// For the 32 inputs from 32 `Part` on.
    template <int Part>
    __device__ __forceinline__ void select() {
        if constexpr (Part % (1 << Shift) == 0) {
            constexpr int kGroup = (Part >> Shift) % kHeld;
            if constexpr (Scaled) {
                const uint32_t both = scales[kGroup];
                if constexpr (NibbleBits<T>::kBits == 0x58005800) {
                    scale[0] = __byte_perm(both, both, 0x1010);
                    scale[1] = __byte_perm(both, both, 0x3232);
                } else {
                    const float2 f = __half22float2(*reinterpret_cast<const __half2*>(&both));
                    asm("cvt.rn.bf16x2.f32 %0, %1, %1;" : "=r"(scale[0]) : "f"(f.x));
                    asm("cvt.rn.bf16x2.f32 %0, %1, %1;" : "=r"(scale[1]) : "f"(f.y));
                }
            }
            if (zeros_at == 0) return;
            // bytes 2 (kGroup % 2) and the next of a word, each in two 16-bit halves
            constexpr uint32_t kTake = kGroup % 2 ? 0x4242 : 0x4040;
            minus_zero[0] = kNegative | (__byte_perm(zeros[kGroup / 2], 0, kTake) << 3);
            minus_zero[1] = kNegative | (__byte_perm(zeros[kGroup / 2], 0, kTake + 0x0101) << 3);
        }
    }
    /// What a sum over group `Group`'s fragments is to be multiplied by, for rows g and g + 8.
    template <int Group>
    __device__ __forceinline__ float2 factor() const {
        static_assert(kHeld == kGroups);
        return __half22float2(*reinterpret_cast<const __half2*>(&scales[Group]));
    }
    template <int Step>
    __device__ __forceinline__ void fragment(uint32_t (&f)[4]) const {
        constexpr int kFirst = Step % 2 * 2;
        f[0] = value<kFirst>(word_of(low, Step / 2), 0);
        f[1] = value<kFirst>(word_of(high, Step / 2), 1);
        f[2] = value<kFirst + 1>(word_of(low, Step / 2), 0);
        f[3] = value<kFirst + 1>(word_of(high, Step / 2), 1);
    }

private:
    static constexpr uint32_t kNegative = NibbleBits<T>::kBits | 0x80008000;
    template <int I>
    __device__ __forceinline__ uint32_t value(uint32_t word, int row) const {
        const uint32_t turned = I == 0 ? word : __funnelshift_r(word, word, 4 * I);
        const uint32_t whole = add_pairs<T>(and_or<0x00780078, NibbleBits<T>::kBits>(turned), minus_zero[row]);
        return Scaled ? multiply_pairs<T>(whole, scale[row]) : whole;
    }
};

template <typename T, Weight kWeight, int Shift, bool Scaled>
struct Stripe {
    uint4 low, high;  // of 64 of the inputs
    uint32_t at;

    __device__ __forceinline__ Stripe(uint32_t first, bool, int lane) : at(first + lane * 16) {
        asm volatile("" : "+r"(at));
    }
    template <int Half>
    __device__ __forceinline__ void load(uint32_t offset) {
        low = load_shared<uint4>(at + offset + Half * 1024);
        high = load_shared<uint4>(at + offset + Half * 1024 + 512);
    }
    template <int Part>
    __device__ __forceinline__ void select() {}
    template <int Step>
    __device__ __forceinline__ void fragment(uint32_t (&f)[4]) const {
        eight_fragment<T, kWeight>(f, word_of(low, Step % 4), word_of(high, Step % 4));
    }
};

}  // namespace trtllm::weight_only
