#include "libtorch/executor.h"

#include <ATen/Parallel.h>

namespace tether {

Executor torch_executor() {
  return {.run = [](void*, int64_t tasks, Executor::Task task, void* argument) {
    at::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) task(argument, i);
    });
  }};
}

}  // namespace tether
