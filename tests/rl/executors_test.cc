// Promise 3: not one bit depends on who runs the chunks, how many they are and in what order.

#include <gtest/gtest.h>

#include <string>
#include <thread>
#include <vector>

#include "core/parallel.h"
#include "rl/catalogue.h"
#include "tests/rl/policy_batch.h"
#include "tests/rl/preference_batch.h"
#include "tests/rl/value_batch.h"

namespace tether {
namespace {

// A pool of threads that takes tasks in no particular order.
struct Threads {
  int count;
  Executor executor() {
    return {.run =
                [](void* context, int64_t tasks, Executor::Task task, void* argument) {
                  const int n = static_cast<Threads*>(context)->count;
                  std::vector<std::thread> threads;
                  for (int i = 0; i < n; ++i) {
                    threads.emplace_back([=] {
                      for (int64_t j = tasks - 1 - i; j >= 0; j -= n) task(argument, j);
                    });
                  }
                  for (std::thread& thread : threads) thread.join();
                },
            .context = this};
  }
};

const Executor kBackwards{.run = [](void*, int64_t tasks, Executor::Task task, void* argument) {
  for (int64_t i = tasks - 1; i >= 0; --i) task(argument, i);
}};

// run(executor) gives totals and fills gradient.
template <class Gradient, class Run>
void expect_same_bits(std::string_view name, const Gradient& gradient, Run run) {
  const auto serial = run(Executor{});
  const Gradient want = gradient;
  const auto expect_same = [&](const Executor& executor, const std::string& how) {
    const auto got = run(executor);
    EXPECT_EQ(got.loss, serial.loss) << name << how;
    EXPECT_EQ(got.metrics.sums, serial.metrics.sums) << name << how;
    EXPECT_EQ(gradient, want) << name << how;
  };
  for (int count : {1, 2, 3, 8}) {
    Threads threads{count};
    expect_same(threads.executor(), ", threads: " + std::to_string(count));
  }
  expect_same(kBackwards, ", the last chunk first");
}

TEST(Executors, ChangeNoBitOfAPolicyLoss) {
  Batch<float> batch = random_batch<float>(37, 1500);
  for (const CatalogueRow& row : kCatalogue) {
    expect_same_bits(row.name, batch.dlogps, [&](const Executor& executor) {
      return batch.run(row.preset(), {}, executor);
    });
  }
}

TEST(Executors, ChangeNoBitOfAWeightedLoss) {
  Batch<float> batch = random_batch<float>(60, 300);
  PolicyObjective objective = presets::gspo();
  objective.weights = {{TruncatedImportance{}},
                       {TvMask{}, WeightLevel::sequence_mean},
                       {MaskedImportance{}, WeightLevel::turn_sum},
                       {RatioGate{}, WeightLevel::turn_mean}};
  expect_same_bits("weighted gspo", batch.dlogps,
                   [&](const Executor& executor) { return batch.run(objective, {}, executor); });
}

TEST(Executors, ChangeNoBitOfAPreferenceLoss) {
  PairRows<float> batch(20, 1500);
  for (const PreferenceRow& row : kPreferenceCatalogue) {
    PreferenceObjective objective = row.preset();
    batch.labels.assign(objective.loss.takes_labels() ? 40 : 0, 1.0f);
    const auto expect_same = [&] {
      expect_same_bits(row.name, batch.dlogps, [&](const Executor& executor) {
        return batch.run(objective, {}, executor);
      });
    };
    expect_same();
    objective.nll.coefficient = 0.5;
    if (!objective.loss.takes_labels()) objective.ld_alpha = 0.5;
    expect_same();
  }
}

TEST(Executors, ChangeNoBitOfAValueLoss) {
  ValueRows<float> batch(37, 1500);
  expect_same_bits("value_loss", batch.dvalues,
                   [&](const Executor& executor) { return batch.run({}, {}, executor); });
}

}  // namespace
}  // namespace tether
