#include "pool.h"

#include <unistd.h>

#ifdef __linux__
#include <linux/futex.h>
#include <sched.h>
#include <sys/syscall.h>
#endif

namespace tn {

namespace {

constexpr int kBarrierSpins = 20000;  // some 100 us: longer than any imbalance, shorter than a scheduler's slice
constexpr int kIdleSpins = 40000;     // between two decode steps the caller samples a token; sleeping would cost more
constexpr int kCrowdedSpins = 100;    // more threads than processors: whoever waits is in the way of the others

inline void relax() {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

}  // namespace

void Gate::wait(uint32_t seen, int spins) {
    for (int i = 0; i < spins; ++i) {
        if (word_.load(std::memory_order_acquire) != seen) return;
        relax();
    }
    sleepers_.fetch_add(1);
    while (word_.load() == seen) {
#ifdef __linux__
        syscall(SYS_futex, &word_, FUTEX_WAIT_PRIVATE, seen, nullptr, nullptr, 0);
#else
        std::this_thread::yield();
#endif
    }
    sleepers_.fetch_sub(1);
}

void Gate::open() {
    word_.fetch_add(1);
#ifdef __linux__
    if (sleepers_.load() != 0) syscall(SYS_futex, &word_, FUTEX_WAKE_PRIVATE, 1 << 30, nullptr, nullptr, 0);
#endif
}

Pool::Pool(int threads) : count_(threads < 1 ? 1 : threads) {
    int processors = (int)std::thread::hardware_concurrency();
#ifdef __linux__
    cpu_set_t set;
    if (sched_getaffinity(0, sizeof set, &set) == 0) processors = CPU_COUNT(&set);
#endif
    crowded_ = count_ > processors;
}

Pool::~Pool() {
    if (threads_.empty()) return;
    if (owner_ != (long)getpid()) {
        // after a fork the handles name threads of another process: nothing to join
        for (auto& t : threads_) t.detach();
        return;
    }
    stopping_ = true;
    begin_->open();
    for (auto& t : threads_) t.join();
}

void Pool::start() {
    for (auto& t : threads_) t.detach();  // only after a fork
    threads_.clear();
    begin_ = std::make_unique<Gate>();
    turn_ = std::make_unique<Gate>();
    arrived_ = 0;
    for (auto& set : cursors_) set = std::make_unique<Padded[]>(count_);
    owner_ = (long)getpid();
    const uint32_t seen = begin_->current();
    for (int i = 1; i < count_; ++i) threads_.emplace_back([this, i, seen] { serve(i, seen); });
}

void Pool::serve(int index, uint32_t seen) {
    for (;;) {
        begin_->wait(seen, crowded_ ? kCrowdedSpins : kIdleSpins);
        seen = begin_->current();
        if (stopping_) return;
        Worker worker{this, index, count_};
        (*body_)(worker);
        worker.barrier();
    }
}

void Pool::run(const std::function<void(Worker&)>& body) {
    if (count_ == 1) {
        Worker worker{this, 0, 1};
        body(worker);
        return;
    }
    if (owner_ != (long)getpid()) start();
    for (auto& set : cursors_)
        for (int i = 0; i < count_; ++i) set[i].value.store(0, std::memory_order_relaxed);
    body_ = &body;
    begin_->open();
    Worker worker{this, 0, count_};
    body(worker);
    worker.barrier();
}

void Worker::barrier() {
    if (count == 1) return;
    Gate& gate = *pool->turn_;
    const uint32_t seen = gate.current();
    if (pool->arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == count) {
        pool->arrived_.store(0, std::memory_order_relaxed);
        for (int i = 0; i < count; ++i) pool->cursors_[phase & 1][i].value.store(0, std::memory_order_relaxed);
        gate.open();
    } else {
        gate.wait(seen, pool->crowded_ ? kCrowdedSpins : kBarrierSpins);
    }
    ++phase;
}

}  // namespace tn
