// Sharing a kernel's items among threads: those of the step that the calling thread has begun, else OpenMP's.
#pragma once

#include <ATen/Parallel.h>

#include "step_threads.h"

// As at::parallel_for; how [begin, end) is cut into pieces, and how often a thread is called, differs from time to time.
template <typename Function>
void share_out(int64_t begin, int64_t end, int64_t grain, const Function& function) {
  StepThreads* threads = StepThreads::held();
  if (threads == nullptr || end - begin <= std::max<int64_t>(grain, 1) || at::in_parallel_region())
    return at::parallel_for(begin, end, grain, function);
  const auto call = [](const void* own, int64_t first, int64_t last) {
    c10::ParallelGuard guard(true);
    (*static_cast<const Function*>(own))(first, last);
  };
  threads->run(begin, end, grain, call, &function);
}
