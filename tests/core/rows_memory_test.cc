// Layouts, threads and shards of core/rows.h.

#include <gtest/gtest.h>
#include <sys/mman.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <thread>
#include <vector>

#include "core/rows.h"
#include "tests/core/rows_reference.h"

namespace tether {
namespace {

using namespace rows_test;

TEST(Rows, ExecutorChangesNoBit) {
  const Batch batch = random_batch(DType::float32, 37, 3000, 3);
  const Result want = batch.run();
  static int threads = 0;
  const Executor::Run spread = [](void*, int64_t tasks, Executor::Task task, void* argument) {
    std::vector<std::thread> pool;
    for (int thread = 0; thread < threads; ++thread) {
      pool.emplace_back([=] {
        for (int64_t i = tasks - 1 - thread; i >= 0; i -= threads) task(argument, i);
      });
    }
    for (std::thread& thread : pool) thread.join();
  };
  for (int count : {1, 2, 3, 8}) {
    threads = count;
    const Result got = batch.run({.run = spread});
    EXPECT_EQ(got.logps, want.logps);
    EXPECT_EQ(got.entropies, want.entropies);
    EXPECT_EQ(got.dlogits, want.dlogits);
  }
}

TEST(Rows, AnyStridesGiveTheSameBits) {
  constexpr int64_t kRows = 6, kVocabulary = 2100;
  for (DType dtype : kAllTypes) {
    const Batch batch = random_batch(dtype, kRows, kVocabulary, 3);
    const Result want = batch.run();
    for (int64_t stride : {1, 3, -2}) {
      // Rows of [2, 3, V] cut out of something larger; negative: columns run backwards.
      ConstLogits view = {nullptr, dtype, kRows,           kVocabulary, 3 * kVocabulary + 5,
                          stride,  3,     16 * kVocabulary};
      Memory memory(dtype, 64 * kVocabulary);
      const int64_t first = 2 * kVocabulary;
      for (int64_t row = 0; row < kRows; ++row) {
        for (int64_t v = 0; v < kVocabulary; ++v) {
          memory.set(static_cast<size_t>(first + view.offset(row) + v * stride),
                     batch.logits[static_cast<size_t>(row * kVocabulary + v)]);
        }
      }
      const int64_t bytes = dtype == DType::float64 ? 8 : dtype == DType::float32 ? 4 : 2;
      view.data = memory.as<std::byte>() + first * bytes;
      Memory gradient(dtype, kRows * kVocabulary);
      const Result got = batch.run_on(view, gradient);
      EXPECT_EQ(got.logps, want.logps) << stride;
      EXPECT_EQ(got.dlogits, want.dlogits) << stride;
    }
  }
}

TEST(Rows, GradientMayHaveStrides) {
  const Batch batch = random_batch(DType::float32, 2, 2100, 3);
  const Doubles want = batch.run().dlogits;
  Memory memory(DType::float32, batch.logits);
  Memory gradient(DType::float32, Doubles(2 * 2100 * 2, 7.0));
  std::vector<RowStatistics> statistics(2);
  row_statistics(batch.view(memory), batch.targets.data(), {}, statistics.data());
  row_gradients(batch.view(memory), batch.targets.data(), {}, statistics.data(),
                batch.dlogps.data(), batch.dentropies.data(),
                {gradient.words.data(), DType::float32, 2, 2100, 4200, 2});
  for (size_t i = 0; i < want.size(); ++i) {
    ASSERT_EQ(gradient.get(2 * i), want[i]);
    ASSERT_EQ(gradient.get(2 * i + 1), 7);
  }
}

TEST(Rows, ElementsBeyondTwoToTheThirtyOne) {
  constexpr int64_t kStride = (int64_t{1} << 31) + 3;
  constexpr size_t kBytes = 3 * static_cast<size_t>(kStride) * sizeof(float);
  void* pages = mmap(nullptr, kBytes, PROT_READ | PROT_WRITE,
                     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (pages == MAP_FAILED) GTEST_SKIP() << "no room for " << kBytes << " bytes of addresses";
  float* logits = static_cast<float*>(pages);
  logits[0] = logits[kStride + 1] = logits[2 * kStride] = 1;
  const std::vector<int64_t> targets = {0, 0, 0};
  std::vector<RowStatistics> by_row(3), by_column(1);
  row_statistics({logits, DType::float32, 3, 2, kStride}, targets.data(), {}, by_row.data());
  row_statistics({logits, DType::float32, 1, 3, 0, kStride}, targets.data(), {}, by_column.data());
  EXPECT_NEAR(logp(by_row[0], 1), -std::log1p(std::exp(-1)), 1e-6);
  EXPECT_NEAR(logp(by_row[1], 1), -std::log1p(std::exp(+1)), 1e-6);
  EXPECT_NEAR(logp(by_row[2], 1), -std::log1p(std::exp(-1)), 1e-6);
  EXPECT_NEAR(logp(by_column[0], 1), -std::log(2 + std::exp(-1)), 1e-6);
  munmap(pages, kBytes);
}

TEST(Rows, MergedShardsAreTheWhole) {
  constexpr double kTemperature = 0.8;
  Batch batch = random_batch(DType::float64, 1, 5000, 20);
  std::fill(batch.logits.begin(), batch.logits.begin() + 1500, -infinity);  // an empty shard
  batch.targets = {4321};
  batch.options.temperature = kTemperature;
  const Result want = batch.run();
  Memory memory(DType::float64, batch.logits);
  for (int64_t shards : {1, 2, 3, 4}) {
    RowStatistics merged;
    for (int64_t shard = 0; shard < shards; ++shard) {
      const int64_t begin = 5000 * shard / shards, end = 5000 * (shard + 1) / shards;
      const int64_t target = 4321 - begin;
      RowStatistics part;
      row_statistics({memory.words.data() + begin, DType::float64, 1, end - begin},
                     4321 < end && target >= 0 ? &target : nullptr, batch.options, &part);
      merged =
          shard % 2 == 0 ? merge(merged, part, kTemperature) : merge(part, merged, kTemperature);
    }
    EXPECT_NEAR(logp(merged, kTemperature), want.logps[0], 1e-13) << shards;
    EXPECT_NEAR(entropy(merged), want.entropies[0], 1e-13) << shards;
  }
}

}  // namespace
}  // namespace tether
