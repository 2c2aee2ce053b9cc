#include "logits/support.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

#include "logits/rows.h"
#include "tests/logits/support_batch.h"

namespace tether {
namespace {

using namespace rows_test;

void expect_same(const Result& got, const Result& want, const std::string& what = "") {
  EXPECT_EQ(got.logps, want.logps) << what;
  EXPECT_EQ(got.entropies, want.entropies) << what;
  EXPECT_EQ(got.dlogits, want.dlogits) << what;
}

// ---- value and gradient -------------------------------------------------------------------------

TEST(Support, TwoOfFourByHand) {
  // The kept logits are 0 and log 3, p = (1/4, 3/4): dentropy/dx_1 = -p_1 (log p_1 + H) = -3/16 log
  // 3, and the reverse for x_0.
  const Batch batch = {.vocabulary = 4,
                       .logits = {9, std::log(3), 5, 0},
                       .targets = {1},
                       .dlogps = {1},
                       .dentropies = {2}};
  const Result result = run(batch, Sets{{3, 1}});
  EXPECT_NEAR(result.logps[0], std::log(0.75), 1e-15);
  EXPECT_NEAR(result.entropies[0], 0.25 * std::log(4) - 0.75 * std::log(0.75), 1e-15);
  EXPECT_EQ(result.dlogits[0], 0);
  EXPECT_EQ(result.dlogits[2], 0);
  EXPECT_NEAR(result.dlogits[3], -0.25 + 2 * 3.0 / 16 * std::log(3), 1e-15);
  EXPECT_NEAR(result.dlogits[1], +0.25 - 2 * 3.0 / 16 * std::log(3), 1e-15);
}

TEST(Support, MatchesTheDefinition) {
  for (DType dtype : kAllTypes) {
    for (int64_t vocabulary : {1, 2, 40, 2049, 32000}) {
      for (int64_t size : {1, 2, 20, 512}) {
        Batch batch = random_batch(dtype, 5, vocabulary, 3);
        batch.options = {.temperature = 0.7, .scale = 1.3};
        if (size == 20) batch.options.softcap = 5;
        const Sets sets = random_sets(batch, size);
        const Batch without = with_others(batch, sets, -infinity);
        const std::string what = name(dtype, vocabulary) + " K=" + std::to_string(size);
        expect_close(run(batch, sets), reference(without, dtype), batch, what);
      }
    }
  }
}

TEST(Support, GradientIsTheDerivativeOfValue) {
  Batch batch = random_batch(DType::float64, 4, 37, 2);
  batch.options = {.temperature = 0.7, .softcap = 4};
  const Sets sets = random_sets(batch, 6);
  expect_derivative(batch, [&](const Batch& at) { return run(at, sets); });
}

TEST(Support, EitherUpstreamMayBeMissing) {
  const Batch both = random_batch(DType::float64, 5, 50, 2);
  const Sets sets = random_sets(both, 8);
  expect_sum_of_upstreams(both, [&](const Batch& at) { return run(at, sets); });
}

// ---- the set ------------------------------------------------------------------------------------

TEST(Support, AllIdsAndNoneAreTheWholeRowToTheBit) {
  for (DType dtype : kAllTypes) {
    const Batch batch = random_batch(dtype, 5, 3000, 3);
    Sets all = random_sets(batch, 3000);
    expect_same(run(batch, all), batch.run(), name(dtype, 3000));
    expect_same(run(batch, Sets(5)), batch.run(), name(dtype, 3000));
  }
}

TEST(Support, OrderCopiesAndLayoutChangeNoBit) {
  const Batch batch = random_batch(DType::float32, 6, 500, 3);
  const Sets sets = random_sets(batch, 30);
  const Result want = run(batch, sets);
  Kept packed;
  pack(sets, packed);
  expect_same(run(batch, packed.view), want, "packed");
  Sets ascending = sets, descending = sets, doubled = sets, with_target = sets;
  for (size_t row = 0; row < sets.size(); ++row) {
    std::sort(ascending[row].begin(), ascending[row].end());
    descending[row].assign(ascending[row].rbegin(), ascending[row].rend());
    doubled[row].insert(doubled[row].end(), sets[row].begin(), sets[row].end());
    if (!sets[row].empty()) with_target[row].insert(with_target[row].begin(), batch.targets[row]);
  }
  expect_same(run(batch, ascending), want, "ascending");
  expect_same(run(batch, descending), want, "descending");
  expect_same(run(batch, doubled), want, "each id twice");
  expect_same(run(batch, with_target), want, "with the target");
}

TEST(Support, IdsOfAnyStrides) {
  const Batch batch = random_batch(DType::float64, 4, 50, 3);
  const Sets sets = {{1, 2, 3}, {4, 5, 6}, {7, 8, 9}, {10, 11, 12}};
  std::vector<int64_t> columns;  // [3, 4], with a -7 behind each
  for (size_t i = 0; i < 3; ++i) {
    for (const auto& set : sets) columns.insert(columns.end(), {set[i], -7});
  }
  const KeptIds kept = {{.rows = 4, .columns = 3}, {columns.data(), DType::int64, 2, 8}};
  expect_same(run(batch, kept), run(batch, sets));
}

TEST(Support, ATargetThatIsMissingIsAddedAndCounted) {
  Batch batch = random_batch(DType::float64, 5, 50, 2);
  const Sets sets = random_sets(batch, 8);
  batch.targets[4] = batch.options.ignore_index;
  Kept kept;
  pad(sets, kept);
  Memory memory(batch.dtype, batch.logits);
  std::vector<RowStatistics> statistics(5);
  std::vector<uint8_t> added(5, 7);
  const int64_t count = support_statistics(batch.view(memory), batch.targets.data(), kept.view, {},
                                           statistics.data(), added.data());
  EXPECT_EQ(added, (std::vector<uint8_t>{0, 1, 0, 0, 0}));  // row 3 has all ids
  EXPECT_EQ(count, 1);
  EXPECT_EQ(support_statistics(batch.view(memory), batch.targets.data(), kept.view, {},
                               statistics.data(), nullptr, backwards_on_threads()),
            1);
}

TEST(Support, WithoutTargetsTheIdsAreAll) {
  const Batch batch = random_batch(DType::float64, 2, 20, 2);
  Kept kept;
  pad({{3, 5}, {7}}, kept);
  Memory memory(batch.dtype, batch.logits);
  RowStatistics statistics[2];
  EXPECT_EQ(support_statistics(batch.view(memory), nullptr, kept.view, {.sums = RowSums::all},
                               statistics),
            0);
  const double odds = std::exp(batch.logits[3] - batch.logits[5]), p = odds / (1 + odds);
  EXPECT_NEAR(entropy(statistics[0]), -p * std::log(p) - (1 - p) * std::log(1 - p), 1e-14);
  EXPECT_EQ(entropy(statistics[1]), 0);
  EXPECT_EQ(statistics[0].columns, 2);
}

// ---- memory -------------------------------------------------------------------------------------

TEST(Support, WhatIsNotKeptIsNotRead) {
  for (DType dtype : kAllTypes) {
    Batch batch = random_batch(dtype, 6, 700, 3);
    Sets sets = random_sets(batch, 20);
    const Batch poisoned = with_others(batch, sets, kNan);
    expect_same(run(poisoned, sets), run(batch, sets), name(dtype, 700));
  }
}

TEST(Support, AnIgnoredRowIsNotLookedAt) {
  Batch batch = random_batch(DType::float32, 3, 40, 3);
  batch.options.ignore_index = 2;
  Sets sets = {{4000, -9}, {3, 5}, {7, 3, 5}};
  batch.targets = {2, 2, 7};  // the last of its ids, at place 2
  std::fill(batch.logits.begin(), batch.logits.begin() + 80, kNan);
  const Result result = run(batch, sets);
  for (const size_t row : {0U, 1U}) {
    EXPECT_EQ(result.logps[row], 0);
    EXPECT_EQ(result.entropies[row], 0);
  }
  for (size_t v = 0; v < 80; ++v) EXPECT_EQ(result.dlogits[v], 0);
  EXPECT_LT(result.logps[2], 0);
}

TEST(Support, ARowWithoutUpstreamIsNotRead) {
  Batch batch = random_batch(DType::float32, 3, 40, 3);
  const Sets sets = random_sets(batch, 5);
  batch.dlogps[1] = batch.dentropies[1] = 0;
  std::fill(batch.logits.begin() + 40, batch.logits.begin() + 80, kNan);
  const Result result = run(batch, sets);
  for (size_t v = 40; v < 80; ++v) EXPECT_EQ(result.dlogits[v], 0);
}

TEST(Support, ALogitThatIsNoNumberSpoilsItsRowAlone) {
  Batch batch = random_batch(DType::float32, 3, 40, 3);
  const Sets sets = random_sets(batch, 5);
  const Result want = run(batch, sets);
  batch.logits[static_cast<size_t>(40 + sets[1][2])] = kNan;
  const Result result = run(batch, sets);
  EXPECT_TRUE(std::isnan(result.logps[1]));
  EXPECT_EQ(result.logps[0], want.logps[0]);
  EXPECT_EQ(result.logps[2], want.logps[2]);
  for (const size_t row : {0U, 1U, 2U}) {
    const std::vector<bool> counts = counted(batch, sets, row);
    for (size_t v = 0; v < 40; ++v) {
      const double gradient = result.dlogits[40 * row + v];
      EXPECT_EQ(std::isnan(gradient), counts[v] && row == 1);
      EXPECT_TRUE(counts[v] || gradient == 0);
    }
  }
}

TEST(Support, ExecutorChangesNoBit) {
  const Batch batch = random_batch(DType::float32, 37, 3000, 3);
  const Sets sets = random_sets(batch, 20);
  expect_same(run(batch, sets, backwards_on_threads()), run(batch, sets));
}

TEST(Support, AnyStridesGiveTheSameBits) {
  constexpr int64_t kVocabulary = 2100;
  for (DType dtype : kAllTypes) {
    const Batch batch = random_batch(dtype, 6, kVocabulary, 3);
    const Sets sets = random_sets(batch, 20);
    const Result want = run(batch, sets);
    Kept kept;
    pack(sets, kept);
    // Rows of [2, 3, V] cut out of something larger.
    ConstLogits view = {nullptr, dtype,           6, kVocabulary, 3 * kVocabulary + 5, 3,
                        3,       16 * kVocabulary};
    Memory memory(dtype, 64 * kVocabulary), gradient(dtype, 64 * kVocabulary);
    for (int64_t row = 0; row < 6; ++row) {
      for (int64_t v = 0; v < kVocabulary; ++v) {
        memory.set(static_cast<size_t>(view.offset(row) + 3 * v),
                   batch.logits[static_cast<size_t>(row * kVocabulary + v)]);
      }
    }
    view.data = memory.words.data();
    const MutableLogits out = {gradient.words.data(), dtype, 6, kVocabulary,
                               view.row_stride,       3,     3, view.batch_stride};
    Result got = run_on(batch, kept.view, view, gradient, out);
    for (int64_t row = 0; row < 6; ++row) {
      for (int64_t v = 0; v < kVocabulary; ++v) {
        got.dlogits[static_cast<size_t>(row * kVocabulary + v)] =
            gradient.get(static_cast<size_t>(out.offset(row) + 3 * v));
      }
    }
    expect_same(got, want, name(dtype, kVocabulary));
    Memory own(dtype, batch.logits);
    const MutableLogits in_place = {own.words.data(), dtype, 6, kVocabulary, kVocabulary};
    expect_same(run_on(batch, kept.view, batch.view(own), own, in_place), want, "in place");
  }
}

// Large gradients are stored past the caches, here in rows that begin anywhere.
TEST(Support, LargeGradientsAreTheSame) {
  constexpr int64_t kVocabulary = 151937;
  for (DType dtype : kAllTypes) {
    const Batch batch = random_batch(dtype, 15, kVocabulary, 3);
    const Sets sets = random_sets(batch, 300);
    const Doubles got = run(batch, sets).dlogits;
    for (const size_t row : {0U, 1U, 14U}) {
      const auto begin = static_cast<int64_t>(row) * kVocabulary;
      const auto cut = [&](const Doubles& all, int64_t size) {
        return Doubles(all.begin() + begin, all.begin() + begin + size);
      };
      Batch alone = batch;
      alone.logits = cut(batch.logits, kVocabulary);
      alone.targets = {batch.targets[row]};
      alone.dlogps = {batch.dlogps[row]};
      alone.dentropies = {batch.dentropies[row]};
      EXPECT_EQ(cut(got, kVocabulary), run(alone, Sets{sets[row]}).dlogits) << row;
    }
  }
}

}  // namespace
}  // namespace tether
