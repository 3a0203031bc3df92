// A pool of threads that run one function together, with a barrier and a work queue cheap enough to use hundreds of
// times a millisecond.
#pragma once
#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <thread>
#include <vector>

namespace tn {

struct alignas(64) Padded {
    std::atomic<int64_t> value{0};
};

// Blocks until a 32-bit word differs from `seen`: spins, yields, then sleeps in the kernel.
class Gate {
  public:
    uint32_t current() const { return word_.load(std::memory_order_acquire); }
    void wait(uint32_t seen, int spins);
    void open();

  private:
    alignas(64) std::atomic<uint32_t> word_{0};
    alignas(64) std::atomic<uint32_t> sleepers_{0};
};

class Pool;

// One thread's view of a run.
struct Worker {
    Pool* pool;
    int index;
    int count;
    uint32_t phase = 0;

    void barrier();

    // Calls body(first, last) over [0, total) in pieces of at most `grain`. Each thread starts in its own contiguous
    // share, which keeps neighbouring work in one cache, and then helps the others. A barrier must follow before the
    // next use.
    template <class Body>
    void share(int64_t total, int64_t grain, Body&& body);
};

class Pool {
  public:
    explicit Pool(int threads);
    ~Pool();
    Pool(const Pool&) = delete;
    Pool& operator=(const Pool&) = delete;

    int threads() const { return count_; }
    // Runs body on every thread, this one included, and returns when all are done.
    void run(const std::function<void(Worker&)>& body);

  private:
    friend struct Worker;
    void start();
    void serve(int index, uint32_t seen);

    int count_;
    long owner_ = 0;  // process that started the threads: a fork inherits none of them
    bool stopping_ = false;
    bool crowded_ = false;  // more threads than processors
    const std::function<void(Worker&)>* body_ = nullptr;
    std::vector<std::thread> threads_;
    std::unique_ptr<Gate> begin_, turn_;
    alignas(64) std::atomic<int> arrived_{0};
    // two sets of cursors: while one is in use the other is clear for the next phase
    std::unique_ptr<Padded[]> cursors_[2];
};

template <class Body>
void Worker::share(int64_t total, int64_t grain, Body&& body) {
    if (total <= 0) return;
    if (count == 1) {
        for (int64_t first = 0; first < total; first += grain) {
            body(first, first + grain < total ? first + grain : total);
        }
        return;
    }
    Padded* cursors = pool->cursors_[phase & 1].get();
    for (int turn = 0; turn < count; ++turn) {
        const int victim = (index + turn) % count;
        const int64_t begin = total * victim / count, end = total * (victim + 1) / count;
        for (;;) {
            if (begin + cursors[victim].value.load(std::memory_order_relaxed) >= end) break;
            const int64_t first = begin + cursors[victim].value.fetch_add(grain, std::memory_order_relaxed);
            if (first >= end) break;
            body(first, first + grain < end ? first + grain : end);
        }
    }
}

}  // namespace tn
