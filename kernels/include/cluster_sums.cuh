// Sums of products whose K is split over the blocks of a cluster (Hopper): every block sends its part of a sum to the block
// that finishes it, by stores that count their bytes on a barrier of the receiver. Nobody waits for a fence over the
// GPU or for a second look at another block's memory; parts are added in the order of K, so that runs repeat bit by bit.
// Sources: PTX ISA 9.0, "st.async", "mapa", "barrier.cluster", "movmatrix".
#pragma once

#include "ptx.cuh"

namespace trtllm::sums {

// An item is what a warp of the matrix unit holds of 16 rows by 8 columns: four 32-bit sums a lane, rows lane / 4 (sums 0
// and 1) and lane / 4 + 8, columns 2 (lane % 4) (sums 0 and 2) and the next.
constexpr int kItemBytes = 512;
// Room for what a block receives of a tile of `items`, over any number of blocks up to 8.
constexpr int received_bytes(int items) { return (items + 7) * kItemBytes; }

__device__ __forceinline__ void arrive_relaxed() { asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory"); }
__device__ __forceinline__ void wait_for_cluster() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }

__device__ __forceinline__ uint32_t address_in(uint32_t local, uint32_t block) {
    uint32_t remote;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(local), "r"(block));
    return remote;
}
// 16 bytes to where `block` has `to`, counted on what it has as `barrier`.
__device__ __forceinline__ void send_16(uint32_t to, uint32_t barrier, uint32_t block, uint32_t a, uint32_t b, uint32_t c,
                                        uint32_t d) {
    asm volatile(
        "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1,%2,%3,%4}, [%5];" ::"r"(
            address_in(to, block)),
        "r"(a), "r"(b), "r"(c), "r"(d), "r"(address_in(barrier, block))
        : "memory");
}

/// Which of a tile's `Items` are finished by which of `split` blocks, and where their parts lie in its memory.
template <int Items>
struct Shares {
    int split, rank;
    __device__ __forceinline__ int first(int block) const { return Items * block / split; }
    __device__ __forceinline__ int first() const { return first(rank); }
    __device__ __forceinline__ int count() const { return first(rank + 1) - first(rank); }
    __device__ __forceinline__ uint32_t bytes() const { return uint32_t(count() * split * kItemBytes); }
    /// Four sums of this lane, of one item, to the block that finishes it.
    __device__ __forceinline__ void send(int item, int lane, uint32_t received, uint32_t barrier, uint32_t a, uint32_t b,
                                         uint32_t c, uint32_t d) const {
        const int owner = ((item + 1) * split - 1) / Items;
        send_16(at(received, item - first(owner), rank, lane), barrier, uint32_t(owner), a, b, c, d);
    }
    /// What block `part` sent of this block's item `local`.
    __device__ __forceinline__ uint4 part(uint32_t received, int local, int part, int lane) const {
        uint4 v;
        asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3}, [%4];"
                     : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                     : "r"(at(received, local, part, lane))
                     : "memory");
        return v;
    }

private:
    __device__ __forceinline__ uint32_t at(uint32_t received, int local, int part, int lane) const {
        return received + uint32_t(((local * split + part) * 32 + lane) * 16);
    }
};

// A pair of 16-bit values of row lane / 4, columns 2 (lane % 4) and the next, for one of row 2 (lane % 4) and the next of
// column lane / 4.
__device__ __forceinline__ uint32_t transposed(uint32_t pair) {
    uint32_t d;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(d) : "r"(pair));
    return d;
}

}  // namespace trtllm::sums
