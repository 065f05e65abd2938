// How much of a core a thread gets of the time in which it could run, as Linux's scheduler counts it.
#pragma once

#include <fcntl.h>
#include <unistd.h>

#include <chrono>
#include <cinttypes>
#include <cstdio>

// For the thread that makes it.
class CoreShare {
 public:
  CoreShare() { read(ran_, waited_); }
  ~CoreShare() {
    if (file_ >= 0) close(file_);
  }
  CoreShare(const CoreShare&) = delete;

  // Whether others had the core for more of the time than the thread, when it was last looked up. Where the system does
  // not tell, they had not.
  bool is_small(std::chrono::steady_clock::time_point now) {
    if (now < next_look_) return is_small_;
    next_look_ = now + kInterval;
    uint64_t ran, waited;
    if (!read(ran, waited) || ran - ran_ + waited - waited_ < kEnough) return is_small_;
    is_small_ = waited - waited_ > ran - ran_;
    ran_ = ran, waited_ = waited;
    return is_small_;
  }

 private:
  static constexpr std::chrono::milliseconds kInterval{20};
  static constexpr uint64_t kEnough = 2'000'000;  // nanoseconds in which it could run, to judge by

  bool read(uint64_t& ran, uint64_t& waited) const {
    char text[64];
    const ssize_t size = file_ < 0 ? -1 : pread(file_, text, sizeof text - 1, 0);
    if (size <= 0) return false;
    text[size] = 0;
    return std::sscanf(text, "%" SCNu64 " %" SCNu64, &ran, &waited) == 2;
  }

  const int file_ = open("/proc/thread-self/schedstat", O_RDONLY | O_CLOEXEC);
  uint64_t ran_ = 0, waited_ = 0;  // nanoseconds
  std::chrono::steady_clock::time_point next_look_{};
  bool is_small_ = false;
};
