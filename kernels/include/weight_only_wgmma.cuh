// What the Hopper kernels of the weight-only product share: wgmma with its first operand in registers, tensor copies, waits.
// Sources: PTX ISA 9.0, "Asynchronous Warpgroup Level Matrix Multiply-Accumulate Instructions" (register fragments and
// shared memory descriptors of m64nNk16), "cp.async.bulk.tensor", "barrier.cluster".
#pragma once

#include <cuda.h>

#include "ptx.cuh"

namespace trtllm::weight_only {

// ---- barriers, copies, clusters -----------------------------------------------------------------------------------

#ifdef TRTLLM_DEBUG_SPIN
// A wait that ends: a mistake in the protocol traps instead of hanging the GPU.
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

// createpolicy's encodings of fraction 1.0: weights are read once, activations by every block of the grid.
constexpr uint64_t kEvictFirst = 0x12F0000000000000ull;
constexpr uint64_t kEvictLast = 0x14F0000000000000ull;

__device__ __forceinline__ void copy_box(void* to, const CUtensorMap& map, int x, int y, uint64_t* barrier,
                                         uint64_t policy) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.L2::cache_hint "
        "[%0], [%1, {%2, %3}], [%4], %5;" ::"r"(ptx::shared_address(to)),
        "l"(&map), "r"(x), "r"(y), "r"(ptx::shared_address(barrier)), "l"(policy)
        : "memory");
}
// The same to the same place in every block of the cluster that `mask` names, counted on each one's barrier.
__device__ __forceinline__ void copy_box_multicast(void* to, const CUtensorMap& map, int x, int y, uint64_t* barrier,
                                                   uint16_t mask, uint64_t policy) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster"
        ".L2::cache_hint [%0], [%1, {%2, %3}], [%4], %5, %6;" ::"r"(ptx::shared_address(to)),
        "l"(&map), "r"(x), "r"(y), "r"(ptx::shared_address(barrier)), "h"(mask), "l"(policy)
        : "memory");
}
__device__ __forceinline__ void prefetch_map(const CUtensorMap& map) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

__device__ __forceinline__ uint32_t cluster_rank() {
    uint32_t rank;
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}
__device__ __forceinline__ void cluster_sync() {
    asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}
// The same where nothing written before needs publishing: without the fence over the whole GPU.
__device__ __forceinline__ void cluster_wait_relaxed() {
    asm volatile("barrier.cluster.arrive.relaxed.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}
// Arrive at a barrier of another block, after reads only: nothing written before needs publishing.
__device__ __forceinline__ void arrive_in(uint64_t* barrier, uint32_t rank) {
    asm volatile(
        "{\n.reg .b32 remote;\n"
        "mapa.shared::cluster.u32 remote, %0, %1;\n"
        "mbarrier.arrive.shared::cluster.b64 _, [remote];\n}" ::"r"(ptx::shared_address(barrier)),
        "r"(rank)
        : "memory");
}
// Four 8x8 matrices of 16-bit values, transposed; lane l gives the address of row l % 8 of matrix l / 8.
__device__ __forceinline__ void store_matrices_transposed(void* row, const uint32_t (&r)[4]) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1,%2,%3,%4};" ::"r"(ptx::shared_address(row)),
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
// A step of 16 inputs along K adds 2 to the descriptor.
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
// Keeps the compiler from moving uses of registers across the waits for the matrix unit.
template <int Count>
__device__ __forceinline__ void pin(float (&d)[Count]) {
#pragma unroll
    for (int i = 0; i < Count; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

template <int Count>
__device__ __forceinline__ void pin(uint32_t (&f)[Count][4]) {
#pragma unroll
    for (int i = 0; i < Count * 4; ++i) asm volatile("" : "+r"(f[i / 4][i % 4])::"memory");
}

/// d[64 rows, N tokens] (+)= a[64, 16] (registers) * b[N, 16]^T (shared memory); `add` = 0 overwrites d.
template <typename T, int N>
struct Wgmma;

#define TRTLLM_WO_LIST_8 "%0, %1, %2, %3, %4, %5, %6, %7"
#define TRTLLM_WO_LIST_16 TRTLLM_WO_LIST_8 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define TRTLLM_WO_LIST_32 \
    TRTLLM_WO_LIST_16 ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define TRTLLM_WO_LIST_64 \
    TRTLLM_WO_LIST_32     \
    ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47" \
    ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define TRTLLM_WO_LIST_128 \
    TRTLLM_WO_LIST_64      \
    ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79" \
    ", %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95" \
    ", %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111" \
    ", %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define TRTLLM_WO_BIND_8(i) \
    "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), "+f"(d[i + 7])
#define TRTLLM_WO_BIND_16(i) TRTLLM_WO_BIND_8(i), TRTLLM_WO_BIND_8(i + 8)
#define TRTLLM_WO_BIND_32(i) TRTLLM_WO_BIND_16(i), TRTLLM_WO_BIND_16(i + 16)
#define TRTLLM_WO_BIND_64(i) TRTLLM_WO_BIND_32(i), TRTLLM_WO_BIND_32(i + 32)
#define TRTLLM_WO_BIND_128(i) TRTLLM_WO_BIND_64(i), TRTLLM_WO_BIND_64(i + 64)

// N tokens in R registers; the operands after them are numbered A0..A3 (fragment), B (descriptor), ADD.
#define TRTLLM_WO_WGMMA(T, TYPE, N, R, A0, A1, A2, A3, B, ADD) \
    template <> \
    struct Wgmma<T, N> { \
        static __device__ __forceinline__ void run(float (&d)[R], const uint32_t (&a)[4], uint64_t b, int add) { \
            asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " ADD ", 0;\n" \
                         "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " {" TRTLLM_WO_LIST_##R "}, {" A0 \
                         ", " A1 ", " A2 ", " A3 "}, " B ", p, 1, 1, 0;\n}" \
                         : TRTLLM_WO_BIND_##R(0) \
                         : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add)); \
        } \
    };
#define TRTLLM_WO_WGMMA_BOTH(N, R, A0, A1, A2, A3, B, ADD) \
    TRTLLM_WO_WGMMA(__half, "f16", N, R, A0, A1, A2, A3, B, ADD) \
    TRTLLM_WO_WGMMA(__nv_bfloat16, "bf16", N, R, A0, A1, A2, A3, B, ADD)

TRTLLM_WO_WGMMA_BOTH(16, 8, "%8", "%9", "%10", "%11", "%12", "%13")
TRTLLM_WO_WGMMA_BOTH(32, 16, "%16", "%17", "%18", "%19", "%20", "%21")
TRTLLM_WO_WGMMA_BOTH(64, 32, "%32", "%33", "%34", "%35", "%36", "%37")
TRTLLM_WO_WGMMA_BOTH(128, 64, "%64", "%65", "%66", "%67", "%68", "%69")
TRTLLM_WO_WGMMA_BOTH(256, 128, "%128", "%129", "%130", "%131", "%132", "%133")
#undef TRTLLM_WO_WGMMA_BOTH
#undef TRTLLM_WO_WGMMA

}  // namespace trtllm::weight_only
