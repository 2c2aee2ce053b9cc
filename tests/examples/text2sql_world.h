#pragma once

#include <ctime>

#include "examples/text2sql/task.h"

namespace text2sql {

// The default task, made once: it takes a second.
inline const Task& task() {
  static const Task kTask(TaskOptions{});
  return kTask;
}

// Of this process: a busy machine does not make it longer.
inline double cpu_seconds(std::clock_t start, std::clock_t end) {
  return static_cast<double>(end - start) / CLOCKS_PER_SEC;
}

}  // namespace text2sql
