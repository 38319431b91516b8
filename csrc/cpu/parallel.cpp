// Work is shared out on torch's own thread pool: no second pool fights it for the cores.
#include <torch/csrc/stable/ops.h>

#include <exception>
#include <mutex>

#include "cpu.h"

namespace lm2::cpu {

void parallel_for(int64_t count, int64_t grain, LoopBody body, void* context) {
  std::exception_ptr error;
  std::mutex mutex;
  torch::stable::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) {
    try {
      body(context, begin, end);
    } catch (...) {
      // torch would pass on that something failed, not what
      const std::lock_guard<std::mutex> lock(mutex);
      error = std::current_exception();
    }
  });
  if (error) std::rethrow_exception(error);
}

int64_t num_threads() { return torch::stable::get_num_threads(); }

}  // namespace lm2::cpu
