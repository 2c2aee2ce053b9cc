// Layouts, threads and shards of logits/rows.h.

#include <gtest/gtest.h>
#include <sys/mman.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <thread>
#include <vector>

#include "logits/rows.h"
#include "tests/logits/rows_reference.h"

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
  EXPECT_NEAR(logp(by_row[0], {}), -std::log1p(std::exp(-1)), 1e-6);
  EXPECT_NEAR(logp(by_row[1], {}), -std::log1p(std::exp(+1)), 1e-6);
  EXPECT_NEAR(logp(by_row[2], {}), -std::log1p(std::exp(-1)), 1e-6);
  EXPECT_NEAR(logp(by_column[0], {}), -std::log(2 + std::exp(-1)), 1e-6);
  munmap(pages, kBytes);
}

// Vocabulary-parallel: each shard has its own columns and the ids of the whole; statistics are
// merged in any order, and each shard's gradient takes the merged ones.
TEST(Rows, MergedShardsAreTheWhole) {
  constexpr int64_t kVocabulary = 5000, kRows = 4;
  for (DType dtype : kAllTypes) {
    for (double softcap : {0.0, 15.0}) {
      Batch batch = random_batch(dtype, kRows, kVocabulary, 20);
      std::fill(batch.logits.begin(), batch.logits.begin() + 1700, -infinity);  // an empty shard
      batch.targets = {4321, 0, 4999, -100};
      batch.options = {.temperature = 0.8, .softcap = softcap, .sums = RowSums::all};
      const Result want = batch.run();
      Memory memory(dtype, batch.logits);
      const int64_t size = dtype == DType::float64 ? 8 : dtype == DType::float32 ? 4 : 2;
      for (int64_t shards : {1, 2, 3, 4}) {
        std::vector<RowStatistics> merged(kRows), part(kRows);
        Memory gradient(dtype, kRows * kVocabulary);
        const auto each_shard = [&](auto visit) {
          for (int64_t shard = 0; shard < shards; ++shard) {
            const int64_t begin = kVocabulary * shard / shards;
            RowOptions options = batch.options;
            options.first_id = begin;
            options.ids = kVocabulary;
            visit(shard, options,
                  ConstLogits{memory.as<std::byte>() + begin * size, dtype, kRows,
                              kVocabulary * (shard + 1) / shards - begin, kVocabulary},
                  gradient.as<std::byte>() + begin * size);
          }
        };
        each_shard([&](int64_t shard, const RowOptions& options, const ConstLogits& view, void*) {
          row_statistics(view, batch.targets.data(), options, part.data());
          for (size_t row = 0; row < kRows; ++row) {
            if (batch.targets[row] == -100) {
              merged[row] = part[row];  // the same everywhere
            } else if (shard % 2 == 0) {
              merged[row] = merge(merged[row], part[row], options);
            } else {
              merged[row] = merge(part[row], merged[row], options);
            }
          }
        });
        each_shard([&](int64_t, const RowOptions& options, const ConstLogits& view, void* out) {
          row_gradients(view, batch.targets.data(), options, merged.data(), batch.dlogps.data(),
                        batch.dentropies.data(), {out, dtype, kRows, view.vocabulary, kVocabulary});
        });
        // Another shard may have another reference, and t is rounded at its size.
        const double bound = dtype == DType::float64 ? 1e-13 : 2e-5;
        for (size_t row = 0; row < kRows; ++row) {
          EXPECT_NEAR(logp(merged[row], batch.options), want.logps[row], bound) << shards;
          EXPECT_NEAR(entropy(merged[row]), want.entropies[row], bound) << shards;
        }
        for (size_t i = 0; i < want.dlogits.size(); ++i) {
          ASSERT_NEAR(gradient.get(i), want.dlogits[i],
                      bound + 2 * rounding(dtype, want.dlogits[i]))
              << shards << " at " << i;
        }
      }
    }
  }
}

}  // namespace
}  // namespace tether
