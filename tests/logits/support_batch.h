#pragma once

#include <algorithm>
#include <cstdint>
#include <random>
#include <thread>
#include <vector>

#include "logits/support.h"
#include "tests/logits/rows_reference.h"

// Kept ids for the tests of logits/support.h.

namespace tether::rows_test {

using Sets = std::vector<std::vector<int64_t>>;

// Those of each row in memory of their own.
struct Kept {
  std::vector<int64_t> ids, offsets;
  std::vector<int32_t> narrow;
  KeptIds view;

  Kept() = default;
  Kept(const Kept&) = delete;
};

// Padded with -1 to the longest, with a column of -1 in front.
inline void pad(const Sets& sets, Kept& out) {
  size_t longest = 1;
  for (const auto& set : sets) longest = std::max(longest, set.size() + 1);
  out.ids.assign(sets.size() * longest, -1);
  for (size_t row = 0; row < sets.size(); ++row) {
    std::copy(sets[row].begin(), sets[row].end(), out.ids.begin() + int64_t(row * longest + 1));
  }
  const auto columns = static_cast<int64_t>(longest);
  out.view = {{.rows = std::ssize(sets), .columns = columns},
              {out.ids.data(), DType::int64, columns, 1}};
}

// One after the other, in int32.
inline void pack(const Sets& sets, Kept& out) {
  out.offsets = {0};
  for (const auto& set : sets) {
    for (const int64_t id : set) out.narrow.push_back(static_cast<int32_t>(id));
    out.offsets.push_back(std::ssize(out.narrow));
  }
  out.view = {{.rows = std::ssize(sets), .offsets64 = out.offsets.data()},
              {out.narrow.data(), DType::int32, 0, 1}};
}

// Of up to `size` different ids each, in any order. The targets are among those of even rows, and
// where there are more ids than one, not among those of row 1; row 3 has none.
inline Sets random_sets(const Batch& batch, int64_t size, unsigned seed = 5) {
  std::mt19937 generator(seed);
  Sets out;
  for (int64_t row = 0; row < batch.rows(); ++row) {
    std::vector<int64_t> ids(static_cast<size_t>(batch.vocabulary));
    for (size_t i = 0; i < ids.size(); ++i) ids[i] = static_cast<int64_t>(i);
    std::shuffle(ids.begin(), ids.end(), generator);
    const int64_t target = batch.targets[static_cast<size_t>(row)];
    if (row == 1 && batch.vocabulary > size) std::erase(ids, target);
    ids.resize(static_cast<size_t>(std::min(size, batch.vocabulary)));
    if (row % 2 == 0 && std::find(ids.begin(), ids.end(), target) == ids.end()) ids[0] = target;
    if (row == 3) ids.clear();
    out.push_back(ids);
  }
  return out;
}

// As a device wants them: each target in its set.
inline Sets device_sets(const Batch& batch, int64_t size) {
  Sets out = random_sets(batch, size);
  for (size_t row = 0; row < out.size(); ++row) {
    const int64_t target = batch.targets[row];
    if (out[row].empty() || std::ranges::count(out[row], target) > 0) continue;
    out[row].push_back(target);
  }
  return out;
}

// Which columns of a row count.
inline std::vector<bool> counted(const Batch& batch, const Sets& sets, size_t row) {
  std::vector<bool> out(static_cast<size_t>(batch.vocabulary), sets[row].empty());
  for (const int64_t id : sets[row]) out[static_cast<size_t>(id)] = true;
  out[static_cast<size_t>(batch.targets[row])] = true;
  return out;
}

// The batch with `value` in the columns that do not count.
inline Batch with_others(const Batch& batch, const Sets& sets, double value) {
  Batch out = batch;
  const auto vocabulary = static_cast<size_t>(batch.vocabulary);
  for (size_t row = 0; row < sets.size(); ++row) {
    const std::vector<bool> counts = counted(batch, sets, row);
    for (size_t v = 0; v < vocabulary; ++v) {
      if (!counts[v]) out.logits[row * vocabulary + v] = value;
    }
  }
  return out;
}

// Tasks on three threads, the last ones first.
inline Executor backwards_on_threads() {
  return {.run = [](void*, int64_t tasks, Executor::Task task, void* argument) {
    std::vector<std::thread> pool;
    for (int64_t thread = 0; thread < 3; ++thread) {
      pool.emplace_back([=] {
        for (int64_t i = tasks - 1 - thread; i >= 0; i -= 3) task(argument, i);
      });
    }
    for (std::thread& thread : pool) thread.join();
  }};
}

// ---- the kernel on a batch
// -----------------------------------------------------------------------

inline Result run_on(const Batch& batch, const KeptIds& kept, const ConstLogits& in,
                     Memory& gradient, const MutableLogits& out, const Executor& executor = {}) {
  std::vector<RowStatistics> statistics(batch.targets.size());
  const int64_t* targets = batch.targets.data();
  support_statistics(in, targets, kept, batch.options, statistics.data(), nullptr, executor);
  Result result;
  for (const RowStatistics& row : statistics) {
    result.logps.push_back(logp(row, batch.options));
    result.entropies.push_back(entropy(row));
  }
  support_gradients(in, targets, kept, batch.options, statistics.data(), Batch::data(batch.dlogps),
                    Batch::data(batch.dentropies), out, executor);
  result.dlogits = gradient.values(batch.rows() * batch.vocabulary);
  return result;
}

inline Result run(const Batch& batch, const KeptIds& kept, const Executor& executor = {}) {
  Memory memory(batch.dtype, batch.logits);
  Memory gradient(batch.dtype, Doubles(batch.logits.size(), kNan));
  const MutableLogits out = {gradient.words.data(), batch.dtype, batch.rows(), batch.vocabulary,
                             batch.vocabulary};
  return run_on(batch, kept, batch.view(memory), gradient, out, executor);
}

inline Result run(const Batch& batch, const Sets& sets, const Executor& executor = {}) {
  Kept kept;
  pad(sets, kept);
  return run(batch, kept.view, executor);
}

}  // namespace tether::rows_test
