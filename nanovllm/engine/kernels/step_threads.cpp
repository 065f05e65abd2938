// The threads of a step, for Python: see step_threads.h.

#include <torch/library.h>

#include <vector>

#include "parallel.h"

namespace {

bool begin_step() { return StepThreads::instance().begin(at::get_num_threads()); }

void end_step() { StepThreads::instance().end(); }

std::vector<int64_t> step_thread_counts() {
  const StepThreads::Counts counts = StepThreads::instance().counts();
  return {counts.threads, counts.kernels, counts.sleeps, counts.pauses};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(nanovllm, library) {
  library.def("begin_step() -> bool", begin_step);
  library.def("end_step() -> ()", end_step);
  library.def("step_thread_counts() -> int[]", step_thread_counts);
}
