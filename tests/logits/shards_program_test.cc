#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "logits/row_program.h"
#include "logits/support_program.h"
#include "tests/host_team.h"
#include "tests/logits/support_batch.h"

// The programs of the CUDA kernels on shards of a vocabulary, beside the whole rows on the CPU.

namespace tether {
namespace {

using namespace rows_test;

constexpr int64_t kBounds[] = {0, 1, 77, 300};
constexpr size_t kShards = std::size(kBounds) - 1;

std::vector<float> floats(const Doubles& values) { return {values.begin(), values.end()}; }

// As they are to be merged: in the words of RowStatistics.
cuda::RowState merged(const std::vector<cuda::RowState>& parts, const RowOptions& options) {
  RowStatistics all;
  for (const cuda::RowState& part : parts) {
    all = merge(all,
                {.reference = part.reference,
                 .rest = double{part.sum} - 1,
                 .weighted_sum = part.weighted_sum,
                 .target_logit = part.target_logit},
                options);
  }
  return {static_cast<float>(all.reference), static_cast<float>(all.rest + 1),
          static_cast<float>(all.weighted_sum), static_cast<float>(all.target_logit)};
}

// Both passes of every shard; kept: null for whole rows.
Result run_shards(const Batch& batch, const KeptIds* kept) {
  Memory memory(batch.dtype, batch.logits), gradient(batch.dtype, Doubles(batch.logits.size(), 7));
  const auto rows = static_cast<size_t>(batch.rows());
  const auto dlogps = floats(batch.dlogps), dentropies = floats(batch.dentropies);
  std::vector<std::vector<cuda::RowState>> states(rows, std::vector<cuda::RowState>(kShards));
  std::vector<cuda::RowState> all(rows);
  std::vector<float> of_ids(10000);
  const auto for_each_shard = [&](auto visit) {
    for (size_t i = 0; i < kShards; ++i) {
      RowOptions options = batch.options;
      options.first_id = kBounds[i];
      options.ids = batch.vocabulary;
      ConstLogits logits = batch.view(memory);
      logits.data = memory.as<float>() + kBounds[i];
      logits.vocabulary = kBounds[i + 1] - kBounds[i];
      MutableLogits out{gradient.as<float>() + kBounds[i], batch.dtype, batch.rows(),
                        logits.vocabulary, batch.vocabulary};
      const auto in = cuda::row_parameters<false>(logits, batch.targets.data(), options);
      for (size_t row = 0; row < rows; ++row) visit(in, i, row, out);
    }
  };
  for_each_shard([&](const auto& in, size_t i, size_t row, const MutableLogits&) {
    const HostTeam<cuda::kForwardThreads> team;
    std::vector<cuda::RowState> found(rows);
    const cuda::RowResults results{.states = found.data()};
    const auto at = static_cast<int64_t>(row);
    kept == nullptr ? cuda::row_statistics_program<float, false, false>(team, in, at, results)
                    : cuda::support_statistics_program<float>(team, in, *kept, at, results);
    states[row][i] = found[row];
  });
  Result result;
  for (size_t row = 0; row < rows; ++row) {
    all[row] = merged(states[row], batch.options);
    result.logps.push_back(
        cuda::logp_of(all[row], 1 / static_cast<float>(batch.options.temperature)));
    result.entropies.push_back(cuda::entropy_of(all[row]));
  }
  for_each_shard([&](const auto& in, size_t, size_t row, const MutableLogits& out) {
    const HostTeam<cuda::kBackwardThreads> team;
    const auto at = static_cast<int64_t>(row);
    kept == nullptr
        ? cuda::row_gradient_program<float, false>(team, in, at, 0, 1, all.data(), dlogps.data(),
                                                   dentropies.data(), out)
        : cuda::support_gradient_program<float>(team, in, *kept, at, 1, all.data(), dlogps.data(),
                                                dentropies.data(), of_ids.data(), out);
  });
  result.dlogits = gradient.values(static_cast<int64_t>(batch.logits.size()));
  return result;
}

Batch batch_of_shards() {
  Batch batch = random_batch(DType::float32, 4, 300, 3);
  batch.options = {.temperature = 0.8};
  batch.targets = {0, 76, 77, 299};
  std::fill_n(batch.logits.begin() + 301, 76, -infinity);  // all of a shard, but for the target
  batch.logits[300 + 76] = 0.5;
  return batch;
}

TEST(ShardsProgram, ShardsAreTheWholeRows) {
  const Batch batch = batch_of_shards();
  expect_close(run_shards(batch, nullptr), batch.run(), batch, "shards");
}

TEST(ShardsProgram, ShardsOfKeptIdsAreTheWholeSets) {
  const Batch batch = batch_of_shards();
  Sets sets = device_sets(batch, 20);
  sets[1] = {batch.targets[1]};  // the other shards have none
  Kept kept;
  pad(sets, kept);
  expect_close(run_shards(batch, &kept.view), run(batch, kept.view), batch, "kept ids");
}

TEST(ShardsProgram, AnIdBeyondAllShardsIsNan) {
  Batch batch = batch_of_shards();
  batch.targets[2] = 300;
  const Result got = run_shards(batch, nullptr);
  for (size_t row = 0; row < 4; ++row) EXPECT_EQ(std::isnan(got.logps[row]), row == 2);
}

}  // namespace
}  // namespace tether
