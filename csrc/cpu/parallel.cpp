// Work is shared out on torch's own thread pool: no second pool fights it for the cores.
#include <torch/csrc/stable/ops.h>

#include "cpu.h"

namespace lm2::cpu {

void parallel_for(int64_t count, int64_t grain, LoopBody body, void* context) {
  torch::stable::parallel_for(
      0, count, grain, [=](int64_t begin, int64_t end) { body(context, begin, end); });
}

}  // namespace lm2::cpu
