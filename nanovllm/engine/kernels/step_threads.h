// Threads that share the work of one step's kernels, and wait between two kernels without sleeping.
//
// A step's kernels are microseconds apart, and waking a sleeping thread takes as long as many of them. So a step opens the
// team, and until it ends the threads spin for the next kernel, for kPatience at most. Between steps they sleep. A thread
// whose core others want spins for kLittlePatience: it would take from them what it does not use.
//
// A kernel's items are shared out as one run for each thread. A thread takes half of what is left of its own run at a
// time, then of the others': what a thread would do that does not come (it sleeps, or something else has its core) is done
// by those that are there, and nobody waits for it. So no item's result may depend on which items are beside it.
#pragma once

#include <pthread.h>
#include <sched.h>
#include <signal.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <exception>
#include <memory>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

#include "core_share.h"

class StepThreads {
 public:
  using Call = void (*)(const void* function, int64_t begin, int64_t end);
  struct Counts {
    int64_t threads, kernels, sleeps, pauses;
  };

  // The process's team. It is never destroyed, as its threads outlive main(); a forked child gets a new one.
  static StepThreads& instance() {
    static const int forks = pthread_atfork(nullptr, nullptr, [] {
      current() = new StepThreads;
      held() = nullptr;
    });
    (void)forks;
    return *current();
  }

  // The team whose step the calling thread has begun; null: none.
  static StepThreads*& held() {
    static thread_local StepThreads* team = nullptr;
    return team;
  }

  // Opens the team for the calling thread's step, with that many threads; false if it is in use or has no second thread.
  bool begin(int threads) {
    if (threads < 2 || in_use_.exchange(true, std::memory_order_acquire)) return false;
    while (static_cast<int>(workers_.size()) < threads - 1 && add_worker()) continue;
    helpers_.store(std::min<int>(threads - 1, workers_.size()), std::memory_order_relaxed);
    held() = this;
    spins_.store(threads <= cores(), std::memory_order_relaxed);
    announce(generation_.load(std::memory_order_relaxed) + 2);
    return true;
  }

  // Ends the step that the calling thread has begun.
  void end() {
    spins_.store(false, std::memory_order_relaxed);
    held() = nullptr;
    in_use_.store(false, std::memory_order_release);
  }

  // Calls function for the whole of [begin, end) in pieces, those of one thread of `grain` items at least; the first
  // exception of any is thrown. For the thread that has begun the step.
  void run(int64_t begin, int64_t end, int64_t grain, Call call, const void* function) {
    const int64_t items = end - begin, least = std::max<int64_t>(grain, 1);
    const int64_t threads = std::min<int64_t>(helpers_.load(std::memory_order_relaxed) + 1, (items + least - 1) / least);
    const int64_t size = (items + threads - 1) / threads;
    for (int64_t i = 0; i < threads; ++i) {
      shares_[i].end = std::min(end, begin + (i + 1) * size);
      shares_[i].next.store(std::min(end, begin + i * size), std::memory_order_relaxed);
    }
    num_shares_ = threads, grain_ = least, call_ = call, function_ = function;
    kernels_.fetch_add(1, std::memory_order_relaxed);
    const uint32_t open = generation_.load(std::memory_order_relaxed) + 1;
    announce(open);
    work(0);
    generation_.store(open + 1);
    wait_for_helpers();
    if (!failed_.test()) return;
    failed_.clear();
    std::rethrow_exception(std::exchange(error_, nullptr));
  }

  Counts counts() const { return {static_cast<int64_t>(helpers_) + 1, kernels_, sleeps_, pauses_}; }

 private:
  static constexpr std::chrono::microseconds kPatience{50}, kLittlePatience{5};
  static constexpr int kPausesPerLook = 8;  // at the clock
  static constexpr size_t kMostThreads = 1024;

  struct alignas(64) Share {
    std::atomic<int64_t> next{0};
    int64_t end = 0;
  };

  static StepThreads*& current() {
    static StepThreads* team = new StepThreads;
    return team;
  }

  static int cores() {
    cpu_set_t allowed;
    return sched_getaffinity(0, sizeof allowed, &allowed) == 0 ? CPU_COUNT(&allowed) : 1;
  }

  static void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
  }

  // Pauses in a step until done() or `until`; returns whether it is done.
  template <typename Done>
  bool spin(std::chrono::steady_clock::time_point until, const Done& done) {
    int64_t pauses = 0;
    bool is_done = done();
    while (!is_done && spins_.load(std::memory_order_relaxed)) {
      if (++pauses % kPausesPerLook == 0 && std::chrono::steady_clock::now() >= until) break;
      pause();
      is_done = done();
    }
    if (pauses) pauses_.fetch_add(pauses, std::memory_order_relaxed);
    return is_done;
  }

  // A new generation: odd ones have a kernel to share.
  void announce(uint32_t generation) {
    generation_.store(generation);
    if (sleepers_.load() > 0) generation_.notify_all();
  }

  void wait_for_helpers() {
    if (spin(std::chrono::steady_clock::now() + kPatience, [this] { return inside_.load() == 0; })) return;
    owner_sleeps_.store(true);
    for (uint32_t inside; (inside = inside_.load()) != 0;) inside_.wait(inside);
    owner_sleeps_.store(false, std::memory_order_relaxed);
  }

  bool add_worker() {
    const size_t place = workers_.size() + 1;
    if (place >= kMostThreads) return false;
    sigset_t all, before;
    sigfillset(&all);
    // A fault's signal is its own thread's: were it blocked, the process would end without a handler (faulthandler's) being called.
    for (const int fault : {SIGSEGV, SIGBUS, SIGFPE, SIGILL}) sigdelset(&all, fault);
    pthread_sigmask(SIG_SETMASK, &all, &before);  // signals are for the threads that were there before
    try {
      workers_.emplace_back([this, place, seen = generation_.load()] { serve(place, seen); });
    } catch (const std::system_error&) {
    }
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
    if (workers_.size() < place) return false;
    pthread_setname_np(workers_.back().native_handle(), "nanovllm-step");
    workers_.back().detach();
    return true;
  }

  void serve(size_t place, uint32_t seen) {
    CoreShare core;
    for (;;) {
      const auto now = std::chrono::steady_clock::now();
      const auto until = now + (core.is_small(now) ? kLittlePatience : kPatience);
      const bool is_wanted = static_cast<int64_t>(place) <= helpers_.load(std::memory_order_relaxed);
      if (!is_wanted || !spin(until, [&] { return generation_.load(std::memory_order_acquire) != seen; })) {
        sleepers_.fetch_add(1);
        sleeps_.fetch_add(1, std::memory_order_relaxed);
        generation_.wait(seen);
        sleepers_.fetch_sub(1, std::memory_order_relaxed);
      }
      seen = generation_.load(std::memory_order_acquire);
      if (seen % 2 == 0) continue;
      inside_.fetch_add(1);
      if (generation_.load() == seen && static_cast<int64_t>(place) < num_shares_) work(place);
      if (inside_.fetch_sub(1) == 1 && owner_sleeps_.load()) inside_.notify_one();
    }
  }

  // Half of what is left of one's own run at a time, then of the others'.
  void work(int64_t place) {
    for (int64_t i = 0; i < num_shares_; ++i) {
      Share& share = shares_[(place + i) % num_shares_];
      int64_t first = share.next.load(std::memory_order_relaxed);
      while (first < share.end) {
        const int64_t last = std::min(share.end, first + std::max(grain_, (share.end - first + 1) / 2));
        if (!share.next.compare_exchange_weak(first, last, std::memory_order_relaxed)) continue;
        try {
          call_(function_, first, last);
        } catch (...) {
          if (!failed_.test_and_set()) error_ = std::current_exception();
        }
        first = share.next.load(std::memory_order_relaxed);
      }
    }
  }

  std::vector<std::thread> workers_;
  std::unique_ptr<Share[]> shares_{new Share[kMostThreads]};
  int64_t num_shares_ = 0, grain_ = 1;
  Call call_ = nullptr;
  const void* function_ = nullptr;
  std::atomic_flag failed_;
  std::exception_ptr error_;
  std::atomic<bool> in_use_{false};
  std::atomic<int64_t> helpers_{0}, kernels_{0}, sleeps_{0}, pauses_{0};
  alignas(64) std::atomic<uint32_t> generation_{0};
  std::atomic<bool> spins_{false};
  alignas(64) std::atomic<uint32_t> inside_{0};
  std::atomic<bool> owner_sleeps_{false};
  alignas(64) std::atomic<int> sleepers_{0};
};
