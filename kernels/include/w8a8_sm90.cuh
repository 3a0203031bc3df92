// What the Hopper kernels of the 8-bit product share: wgmma on 8-bit operands, tensor maps' copies, waits.
// Sources: PTX ISA 9.0, "Asynchronous Warpgroup Level Matrix Multiply-Accumulate Instructions" (shapes m64nNk32, shared
// memory matrix descriptors, 128-byte swizzle), "cp.async.bulk.tensor".
#pragma once

#include <cuda.h>

#include <type_traits>

#include "ptx.cuh"

namespace trtllm::w8a8 {

// ---- barriers and copies ------------------------------------------------------------------------------------------

#ifdef TRTLLM_DEBUG_SPIN
// A wait that ends: a protocol error traps instead of hanging the GPU.
__device__ __forceinline__ void wait(uint64_t* barrier, uint32_t parity) {
    for (int spin = 0; spin < TRTLLM_DEBUG_SPIN; ++spin) {
        uint32_t done;
        asm volatile(
            "{\n.reg .pred done;\n"
            "mbarrier.try_wait.parity.shared::cta.b64 done, [%1], %2;\n"
            "selp.u32 %0, 1, 0, done;\n}"
            : "=r"(done)
            : "r"(ptx::shared_address(barrier)), "r"(parity)
            : "memory");
        if (done) return;
    }
    __trap();
}
#else
__device__ __forceinline__ void wait(uint64_t* barrier, uint32_t parity) { ptx::barrier_wait(barrier, parity); }
#endif

__device__ __forceinline__ void prefetch(const CUtensorMap& map) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

// How long the L2 cache should keep what a copy reads (createpolicy's encodings of fraction 1.0).
constexpr uint64_t kEvictFirst = 0x12F0000000000000ull;
constexpr uint64_t kEvictNormal = 0x1000000000000000ull;
constexpr uint64_t kEvictLast = 0x14F0000000000000ull;

// A box of a two-dimensional tensor map into shared memory, its bytes counted on `barrier`. x counts along K.
__device__ __forceinline__ void copy_box(void* to, const CUtensorMap& map, int x, int y, uint64_t* barrier,
                                         uint64_t policy) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.L2::cache_hint "
        "[%0], [%1, {%2, %3}], [%4], %5;" ::"r"(ptx::shared_address(to)),
        "l"(&map), "r"(x), "r"(y), "r"(ptx::shared_address(barrier)), "l"(policy)
        : "memory");
}
// The same into the same place of every block of the cluster that `mask` names, counted on each one's barrier.
__device__ __forceinline__ void copy_box_multicast(void* to, const CUtensorMap& map, int x, int y, uint64_t* barrier,
                                                   uint16_t mask, uint64_t policy) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster"
        ".L2::cache_hint [%0], [%1, {%2, %3}], [%4], %5, %6;" ::"r"(ptx::shared_address(to)),
        "l"(&map), "r"(x), "r"(y), "r"(ptx::shared_address(barrier)), "h"(mask), "l"(policy)
        : "memory");
}
// A box from shared memory to global memory; what lies outside the tensor is not written.
__device__ __forceinline__ void store_box(const CUtensorMap& map, int x, int y, const void* from) {
    asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group [%0, {%1, %2}], [%3];" ::"l"(&map), "r"(x),
                 "r"(y), "r"(ptx::shared_address(from))
                 : "memory");
}
__device__ __forceinline__ void store_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
// At most `Pending` stores of this thread may still be reading shared memory.
template <int Pending>
__device__ __forceinline__ void store_wait_read() {
    asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(Pending) : "memory");
}

// ---- clusters -----------------------------------------------------------------------------------------------------

__device__ __forceinline__ uint32_t cluster_rank() {
    uint32_t rank;
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}
__device__ __forceinline__ void cluster_arrive() {
    asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
}
// For blocks that only say they are done reading: no writes to publish, so no fence.
__device__ __forceinline__ void cluster_arrive_relaxed() {
    asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
}
__device__ __forceinline__ void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }
// Arrive at a barrier of another block. Only for reads by the matrix unit: ordinary accesses before it are not ordered
// at the cluster's scope, which would cost a fence over the whole GPU.
__device__ __forceinline__ void arrive_in(uint64_t* barrier, uint32_t rank) {
    asm volatile(
        "{\n.reg .b32 remote;\n"
        "mapa.shared::cluster.u32 remote, %0, %1;\n"
        "mbarrier.arrive.shared::cluster.b64 _, [remote];\n}" ::"r"(ptx::shared_address(barrier)),
        "r"(rank)
        : "memory");
}
// Four 8x8 matrices of 16-bit values; lane l gives the address of row l % 8 of matrix l / 8.
__device__ __forceinline__ void store_matrices(void* row, const uint32_t (&r)[4]) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1,%2,%3,%4};" ::"r"(ptx::shared_address(row)),
                 "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3])
                 : "memory");
}

template <int Registers>
__device__ __forceinline__ void take_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(Registers));
}
template <int Registers>
__device__ __forceinline__ void give_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(Registers));
}

// ---- wgmma --------------------------------------------------------------------------------------------------------

// Rows of 128 bytes along K, swizzled by 128 bytes, groups of 8 rows 1024 bytes apart, 1024-byte aligned.
// Steps of 32 bytes along K add 2 to the descriptor.
__device__ __forceinline__ uint64_t descriptor(const void* tile) {
    return (uint64_t(1) << 62) | (uint64_t(64) << 32) | (uint64_t(1) << 16) |
           ((ptx::shared_address(tile) & 0x3FFFF) >> 4);
}
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int Pending>
__device__ __forceinline__ void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(Pending) : "memory");
}
// Keeps the compiler from moving reads or writes of an accumulator across waits for the matrix unit.
template <typename T, int Count>
__device__ __forceinline__ void pin(T (&d)[Count]) {
#pragma unroll
    for (int i = 0; i < Count; ++i) {
        if constexpr (std::is_integral_v<T>) {
            asm volatile("" : "+r"(d[i])::"memory");
        } else {
            asm volatile("" : "+f"(d[i])::"memory");
        }
    }
}

/// The 8-bit types: what the matrix unit sums in.
struct Int8 {
    using Sum = int32_t;
};
struct Fp8 {
    using Sum = float;
};

/// d[64, N] (+)= a[64, 32] * b[N, 32]^T, both from shared memory; `add` = 0 overwrites d.
template <typename Type, int N>
struct Wgmma;

#define TRTLLM_LIST_4 "%0, %1, %2, %3"
#define TRTLLM_LIST_8 \
    TRTLLM_LIST_4     \
    ", %4, %5, %6, %7"
#define TRTLLM_LIST_16 \
    TRTLLM_LIST_8      \
    ", %8, %9, %10, %11, %12, %13, %14, %15"
#define TRTLLM_LIST_32 \
    TRTLLM_LIST_16     \
    ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define TRTLLM_LIST_64                                                                 \
    TRTLLM_LIST_32                                                                     \
    ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47" \
    ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define TRTLLM_LIST_96                                                                 \
    TRTLLM_LIST_64                                                                     \
    ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79" \
    ", %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define TRTLLM_LIST_128                                                                            \
    TRTLLM_LIST_96                                                                                 \
    ", %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111" \
    ", %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define TRTLLM_BIND_4(c, i) c(d[i]), c(d[i + 1]), c(d[i + 2]), c(d[i + 3])
#define TRTLLM_BIND_8(c, i) TRTLLM_BIND_4(c, i), TRTLLM_BIND_4(c, i + 4)
#define TRTLLM_BIND_16(c, i) TRTLLM_BIND_8(c, i), TRTLLM_BIND_8(c, i + 8)
#define TRTLLM_BIND_32(c, i) TRTLLM_BIND_16(c, i), TRTLLM_BIND_16(c, i + 16)
#define TRTLLM_BIND_64(c, i) TRTLLM_BIND_32(c, i), TRTLLM_BIND_32(c, i + 32)
#define TRTLLM_BIND_96(c, i) TRTLLM_BIND_64(c, i), TRTLLM_BIND_32(c, i + 64)
#define TRTLLM_BIND_128(c, i) TRTLLM_BIND_64(c, i), TRTLLM_BIND_64(c, i + 64)

// N columns in R registers; operands A, B and ADD are numbered R, R + 1, R + 2.
#define TRTLLM_WGMMA(N, R, A, B, ADD)                                                                                 \
    template <>                                                                                                       \
    struct Wgmma<Int8, N> {                                                                                           \
        static __device__ __forceinline__ void run(int32_t (&d)[R], uint64_t a, uint64_t b, int add) {                \
            asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " ADD                                                      \
                         ", 0;\n"                                                                                     \
                         "wgmma.mma_async.sync.aligned.m64n" #N "k32.s32.s8.s8 {" TRTLLM_LIST_##R "}, " A ", " B      \
                                                                                                  ", p;\n}"           \
                         : TRTLLM_BIND_##R("+r", 0)                                                                   \
                         : "l"(a), "l"(b), "r"(add));                                                                 \
        }                                                                                                             \
    };                                                                                                                \
    template <>                                                                                                       \
    struct Wgmma<Fp8, N> {                                                                                            \
        static __device__ __forceinline__ void run(float (&d)[R], uint64_t a, uint64_t b, int add) {                  \
            asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " ADD                                                      \
                         ", 0;\n"                                                                                     \
                         "wgmma.mma_async.sync.aligned.m64n" #N "k32.f32.e4m3.e4m3 {" TRTLLM_LIST_##R "}, " A ", " B  \
                                                                                                      ", p, 1, 1;\n}" \
                         : TRTLLM_BIND_##R("+f", 0)                                                                   \
                         : "l"(a), "l"(b), "r"(add));                                                                 \
        }                                                                                                             \
    };

TRTLLM_WGMMA(8, 4, "%4", "%5", "%6")
TRTLLM_WGMMA(16, 8, "%8", "%9", "%10")
TRTLLM_WGMMA(32, 16, "%16", "%17", "%18")
TRTLLM_WGMMA(64, 32, "%32", "%33", "%34")
TRTLLM_WGMMA(128, 64, "%64", "%65", "%66")
TRTLLM_WGMMA(192, 96, "%96", "%97", "%98")
TRTLLM_WGMMA(256, 128, "%128", "%129", "%130")
#undef TRTLLM_WGMMA

}  // namespace trtllm::w8a8
