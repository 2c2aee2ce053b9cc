#pragma once

#include <cstdint>

namespace tether {

// A loop over tasks that somebody else runs: run(context, tasks, task, argument) calls
// task(argument, i) once for every i in [0, tasks), in any order, on any thread, and returns when
// all are done. The library owns no threads; results never depend on the order.
struct Executor {
  using Task = void (*)(void* argument, int64_t index);
  using Run = void (*)(void* context, int64_t tasks, Task task, void* argument);

  Run run = [](void*, int64_t tasks, Task task, void* argument) {
    for (int64_t i = 0; i < tasks; ++i) task(argument, i);
  };
  void* context = nullptr;
};

template <class Body>
void parallel_for(const Executor& executor, int64_t tasks, Body body) {
  const auto task = [](void* argument, int64_t index) { (*static_cast<Body*>(argument))(index); };
  executor.run(executor.context, tasks, task, &body);
}

// Work is cut into chunks by its shape alone, never by the number of threads: partial sums of the
// chunks, added in order, are then the same bits on any machine load.
inline constexpr int kMaxChunks = 64;

struct Chunks {
  int64_t rows = 0;
  int64_t count = 0;

  // About 8192 elements a chunk, at most kMaxChunks of them, at least one row each.
  static Chunks of(int64_t rows, int64_t elements) {
    int64_t count = elements / 8192 + 1;
    if (count > rows) count = rows;
    if (count > kMaxChunks) count = kMaxChunks;
    return {rows, count};
  }
  int64_t begin(int64_t chunk) const { return split(chunk); }
  int64_t end(int64_t chunk) const { return split(chunk + 1); }

 private:
  int64_t split(int64_t chunk) const {
    const int64_t base = rows / count;
    const int64_t extra = rows % count;
    return chunk * base + (chunk < extra ? chunk : extra);
  }
};

}  // namespace tether
