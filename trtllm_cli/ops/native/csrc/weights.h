// Packed weights (the layouts of packing.py) and the scratch a thread works in.
#pragma once
#include <sys/mman.h>

#include <cstdint>
#include <cstdlib>
#include <new>

#include "simd.h"

namespace tn {

enum Format { kFloat32 = 0, kBfloat16 = 1, kFloat16 = 2, kInt8 = 3, kInt4 = 4, kE4m3 = 5, kInt8Dot = 6 };

struct Weight {
    int format = 0;
    int64_t n = 0, k = 0;
    int64_t group = 0;        // int4: inputs that share a scale
    bool half_scale = false;  // int4: scales are float16
    const void* packed = nullptr;
    const void* scale = nullptr;
    const uint8_t* zero = nullptr;
    const float* bias = nullptr;

    int64_t panels() const { return (n + kLanes - 1) / kLanes; }
    int64_t groups() const { return format == kInt4 ? k / group : 1; }
    int64_t words() const { return (group + 7) / 8; }  // int4: 32-bit words a group and output
    // bytes of one panel of sixteen outputs
    int64_t panel_bytes() const {
        switch (format) {
            case kFloat32: return k * 64;
            case kBfloat16: return (k + 1) / 2 * 64;
            case kFloat16: return k * 32;
            case kInt8: return k * 16;
            case kE4m3: return (k + 1) / 2 * 32;
            case kInt8Dot: return (k + 3) / 4 * 64;
            default: return groups() * words() * 64;
        }
    }
    const char* panel(int64_t p) const { return (const char*)packed + p * panel_bytes(); }
    v16 int4_scale(int64_t p, int64_t g) const {
        const int64_t at = (p * groups() + g) * kLanes;
        return half_scale ? load_halves((const uint16_t*)scale + at) : load((const float*)scale + at);
    }
    // how far the zero point lies from 8, the middle value that dequantisation subtracts
    v16 int4_offset(int64_t p, int64_t g) const {
        return zero ? load_ubytes(zero + (p * groups() + g) * kLanes) - 8.0f : v16{};
    }
};

// Memory that costs nothing until it is touched, zero when it first is.
class Pages {
  public:
    Pages() = default;
    explicit Pages(size_t bytes) : bytes_(bytes ? bytes : 1) {
        data_ = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (data_ == MAP_FAILED) {
            data_ = nullptr;
            throw std::bad_alloc();
        }
    }
    Pages(Pages&& other) noexcept { swap(other); }
    Pages& operator=(Pages&& other) noexcept {
        swap(other);
        return *this;
    }
    ~Pages() {
        if (data_) munmap(data_, bytes_);
    }
    void* data() const { return data_; }
    float* floats() const { return (float*)data_; }
    size_t bytes() const { return bytes_; }
    void swap(Pages& other) {
        std::swap(data_, other.data_);
        std::swap(bytes_, other.bytes_);
    }

  private:
    void* data_ = nullptr;
    size_t bytes_ = 0;
};

// Thread-private scratch that grows to the largest request and is never zeroed again.
class Scratch {
  public:
    template <class T>
    T* get(size_t count) {
        const size_t bytes = count * sizeof(T) + 64;
        if (bytes > pages_.bytes()) pages_ = Pages(bytes + bytes / 4 + 4096);
        return (T*)pages_.data();
    }
    size_t bytes() const { return pages_.bytes(); }

  private:
    Pages pages_;
};

// Row `index` of the matrix as float32, out[0..k).
void embedding_row(const Weight& w, int64_t index, float* out);

// Panels [first, first + count) as float32 [count][k][16], or as bfloat16 pairs [count][ceil(k/2)][16][2], of inputs
// [k0, k1) (k0 even, and at the start of a group for int4). int8 and E4M3 stay unscaled:
// their scale belongs to the outputs. Not for kInt8Dot.
void unpack_float(const Weight& w, int64_t panel, int64_t k0, int64_t k1, float* out);
void unpack_pairs(const Weight& w, int64_t panel, int64_t k0, int64_t k1, uint16_t* out, Scratch& scratch);

}  // namespace tn
