// Hopper's asynchronous matrix products on accumulator fragments float[N / 8][4], and tensor copies into shared memory.
// Sources: PTX ISA 9.0, "Asynchronous warpgroup level matrix instructions" (shapes, fragments, matrix descriptors) and
// "cp.async.bulk.tensor".
#pragma once

#include <cuda.h>

#include <type_traits>

#include "ptx.cuh"

#if defined(TRTLLM_SM90A)

namespace trtllm::fmha {

// ---- descriptors of operands in shared memory, rows of 128 bytes swizzled by the copy engine ----------------------

// `leading` and `step` in bytes. An operand whose reduction axis is contiguous has rows in groups of 8 that lie `step`
// apart; one whose other axis is contiguous has its 8 x 64 blocks `step` apart along the reduction and `leading` apart
// along the other axis.
__device__ __forceinline__ uint64_t descriptor(uint32_t address, uint32_t leading, uint32_t step) {
    return uint64_t((address & 0x3FFFF) >> 4) | uint64_t(leading >> 4) << 16 | uint64_t(step >> 4) << 32 |
           uint64_t(1) << 62;
}

__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int Pending>
__device__ __forceinline__ void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(Pending) : "memory");
}
// Keeps the compiler from reading or writing a fragment on the wrong side of a fence or a wait.
template <int N>
__device__ __forceinline__ void pin(float (&d)[N][4]) {
#pragma unroll
    for (int i = 0; i < N; ++i) {
#pragma unroll
        for (int e = 0; e < 4; ++e) asm volatile("" : "+f"(d[i][e])::"memory");
    }
}

// ---- products -----------------------------------------------------------------------------------------------------

#define TRTLLM_D4(d, i) "+f"(d[i][0]), "+f"(d[i][1]), "+f"(d[i][2]), "+f"(d[i][3])
#define TRTLLM_D16(d, i) TRTLLM_D4(d, i), TRTLLM_D4(d, i + 1), TRTLLM_D4(d, i + 2), TRTLLM_D4(d, i + 3)
#define TRTLLM_D32(d, i) TRTLLM_D16(d, i), TRTLLM_D16(d, i + 4)
#define TRTLLM_D64(d, i) TRTLLM_D32(d, i), TRTLLM_D32(d, i + 8)

#define TRTLLM_N0 "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15"
#define TRTLLM_N1 "%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define TRTLLM_N2 "%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47"
#define TRTLLM_N3 "%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"
#define TRTLLM_N4 "%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79"
#define TRTLLM_N5 "%80,%81,%82,%83,%84,%85,%86,%87,%88,%89,%90,%91,%92,%93,%94,%95"
#define TRTLLM_N6 "%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,%108,%109,%110,%111"
#define TRTLLM_N7 "%112,%113,%114,%115,%116,%117,%118,%119,%120,%121,%122,%123,%124,%125,%126,%127"

// d (64 x N) = [accumulate] d + a (64 x 16, shared) * b (16 x N, shared), both with the reduction axis contiguous
template <typename T, int N>
struct SharedProduct;
// d (64 x N) = [accumulate] d + a (64 x 16, registers) * b (16 x N, shared, N contiguous)
template <typename T, int N>
struct RegisterProduct;

#define TRTLLM_SHARED_PRODUCT(TYPE, NAME, N, LIST, A, B, P, ...)                                          \
    template <>                                                                                            \
    struct SharedProduct<TYPE, N> {                                                                        \
        static __device__ __forceinline__ void run(float (&d)[N / 8][4], uint64_t a, uint64_t b, bool add) { \
            asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " P ", 0;\n"                                    \
                         "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." NAME "." NAME " {" LIST "}, " A ", " B \
                         ", p, 1, 1, 0, 0;\n}"                                                             \
                         : __VA_ARGS__                                                                     \
                         : "l"(a), "l"(b), "r"(int(add)));                                                 \
        }                                                                                                  \
    };
#define TRTLLM_REGISTER_PRODUCT(TYPE, NAME, N, LIST, A, B, P, ...)                                        \
    template <>                                                                                            \
    struct RegisterProduct<TYPE, N> {                                                                      \
        static __device__ __forceinline__ void run(float (&d)[N / 8][4], const uint32_t (&a)[4], uint64_t b, bool add) { \
            asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " P ", 0;\n"                                    \
                         "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." NAME "." NAME " {" LIST "}, {" A "}, " B \
                         ", p, 1, 1, 1;\n}"                                                                \
                         : __VA_ARGS__                                                                     \
                         : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int(add)));             \
        }                                                                                                  \
    };
#define TRTLLM_BOTH(KIND, ...) KIND(__half, "f16", __VA_ARGS__) KIND(__nv_bfloat16, "bf16", __VA_ARGS__)

TRTLLM_BOTH(TRTLLM_SHARED_PRODUCT, 64, TRTLLM_N0 "," TRTLLM_N1, "%32", "%33", "%34", TRTLLM_D32(d, 0))
TRTLLM_BOTH(TRTLLM_SHARED_PRODUCT, 128, TRTLLM_N0 "," TRTLLM_N1 "," TRTLLM_N2 "," TRTLLM_N3, "%64", "%65", "%66", TRTLLM_D64(d, 0))
TRTLLM_BOTH(TRTLLM_REGISTER_PRODUCT, 64, TRTLLM_N0 "," TRTLLM_N1, "%32,%33,%34,%35", "%36", "%37", TRTLLM_D32(d, 0))
TRTLLM_BOTH(TRTLLM_REGISTER_PRODUCT, 80, TRTLLM_N0 "," TRTLLM_N1 ",%32,%33,%34,%35,%36,%37,%38,%39", "%40,%41,%42,%43", "%44", "%45", TRTLLM_D32(d, 0), TRTLLM_D4(d, 8), TRTLLM_D4(d, 9))
TRTLLM_BOTH(TRTLLM_REGISTER_PRODUCT, 96, TRTLLM_N0 "," TRTLLM_N1 "," TRTLLM_N2, "%48,%49,%50,%51", "%52", "%53", TRTLLM_D32(d, 0), TRTLLM_D16(d, 8))
TRTLLM_BOTH(TRTLLM_REGISTER_PRODUCT, 128, TRTLLM_N0 "," TRTLLM_N1 "," TRTLLM_N2 "," TRTLLM_N3, "%64,%65,%66,%67", "%68", "%69", TRTLLM_D64(d, 0))
TRTLLM_BOTH(TRTLLM_REGISTER_PRODUCT, 256, TRTLLM_N0 "," TRTLLM_N1 "," TRTLLM_N2 "," TRTLLM_N3 "," TRTLLM_N4 "," TRTLLM_N5 "," TRTLLM_N6 "," TRTLLM_N7, "%128,%129,%130,%131", "%132", "%133", TRTLLM_D64(d, 0), TRTLLM_D64(d, 16))

// ---- tensor copies and waits --------------------------------------------------------------------------------------

__device__ __forceinline__ void copy_box_3d(void* to, const CUtensorMap* map, int x, int y, int z, uint64_t* barrier) {
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4}], "
        "[%5];" ::"r"(ptx::shared_address(to)),
        "l"(map), "r"(x), "r"(y), "r"(z), "r"(ptx::shared_address(barrier))
        : "memory");
}
__device__ __forceinline__ void copy_box_4d(void* to, const CUtensorMap* map, int x, int y, int z, int w,
                                            uint64_t* barrier) {
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4, "
        "%5}], [%6];" ::"r"(ptx::shared_address(to)),
        "l"(map), "r"(x), "r"(y), "r"(z), "r"(w), "r"(ptx::shared_address(barrier))
        : "memory");
}
__device__ __forceinline__ void wait(uint64_t* barrier, uint32_t parity) {
#if defined(TRTLLM_DEBUG_SPIN)
    uint64_t start, now;  // nanoseconds
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(start));
    for (;;) {
        uint32_t done;
        asm volatile(
            "{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}"
            : "=r"(done)
            : "r"(ptx::shared_address(barrier)), "r"(parity)
            : "memory");
        if (done) return;
        asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
        if (now - start > 1000000000) __trap();
    }
#else
    ptx::barrier_wait(barrier, parity);
#endif
}
template <int Registers>
__device__ __forceinline__ void give_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(Registers));
}
template <int Registers>
__device__ __forceinline__ void take_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(Registers));
}

}  // namespace trtllm::fmha

#endif  // TRTLLM_SM90A
