#include "rl/kernels/logits_policy_program.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

#include "logits/rows.h"
#include "rl/kernels/logits_policy_calls.h"
#include "tests/logits/rows_reference.h"
#include "tests/rl/host_launch.h"
#include "tests/rl/own_surrogate.h"
#include "tests/rl/policy_batch.h"
#include "tests/thread_team.h"

// The programs of logits_policy_loss.cu on teams of host threads, in the order and the shapes in
// which it launches them, beside the CPU kernels of rows and of the policy loss.

namespace tether {
namespace {

using rows_test::kNan;
using rows_test::Memory;

// Tokens with logits, somewhere in a larger memory.
struct Tokens {
  Batch<float> batch;
  int64_t vocabulary;
  RowOptions options = {};
  std::vector<int64_t> targets, offsets;  // offsets: none in a padded batch
  std::vector<float> entropy_weights, row_tokens;
  int64_t first = 0, gap = 0, stride = 1;
  int64_t leaves = -1;  // a token that a weight takes out
  Memory logits;

  Tokens(DType dtype, int64_t rows, int64_t columns, int64_t v, int64_t at = 0, int64_t space = 0,
         int64_t step = 1)
      : batch(random_batch<float>(rows, columns)),
        vocabulary(v),
        first(at),
        gap(space),
        stride(step),
        logits(dtype,
               rows_test::Doubles(
                   static_cast<size_t>(at + rows * columns * (v * step + space) + 32), 0.125)) {
    const auto numbers = rows_test::normal(count() * v, 3, 5);
    for (int64_t i = 0; i < count(); ++i) {
      targets.push_back((i * 977 + 3) % v);
      for (int64_t c = 0; c < v; ++c) set(i, c, numbers[static_cast<size_t>(i * v + c)]);
    }
    batch.mask[1] = 0;
    batch.mask[2] = 0.5f;
    move_near();
  }
  // The other policies are as far from these logits as they were from logps of the batch.
  void move_near() {
    std::vector<RowStatistics> statistics(targets.size());
    row_statistics(view<const void>(logits), targets.data(), options, statistics.data());
    for (size_t i = 0; i < targets.size(); ++i) {
      const auto found = static_cast<float>(logp(statistics[i], options));
      for (auto* others : {&batch.old_logps, &batch.ref_logps, &batch.rollout_logps}) {
        (*others)[i] += found - batch.logps[i];
      }
      batch.logps[i] = found;
    }
  }
  int64_t count() const { return batch.rows * batch.columns; }
  size_t place(int64_t token, int64_t column) const {
    return static_cast<size_t>(first + token * (vocabulary * stride + gap) + column * stride);
  }
  void set(int64_t token, int64_t column, double value) { logits.set(place(token, column), value); }
  template <class Byte>
  BasicLogits<Byte> view(Memory& memory) const {
    auto* data = memory.as<char>() + first * bytes_of(memory.dtype);
    return {data, memory.dtype, count(), vocabulary, vocabulary * stride + gap, stride};
  }
  PolicyArrays arrays() const {
    PolicyArrays out = batch.arrays();
    out.logps = {};
    if (batch.old_logps.empty()) out.old_logps = {};
    if (!entropy_weights.empty()) out.entropy_weights = batch.view(entropy_weights);
    if (!row_tokens.empty()) {
      out.row_tokens = {
          .data = row_tokens.data(), .dtype = DType::float32, .row_stride = 1, .per_row = true};
    }
    if (!offsets.empty()) {
      out.layout = {.rows = static_cast<int64_t>(offsets.size()) - 1,
                    .columns = count(),
                    .offsets64 = offsets.data()};
    }
    return out;
  }
};

struct Found {
  PolicyTotals totals;
  std::vector<float> logps, entropies;
  Memory gradient;
};

template <class T>
BasicArray<T> column_of(T* data, const Tokens& tokens) {
  return {data, DType::float32, tokens.batch.columns, 1};
}

// By the CPU kernels: rows, loss, rows.
Found by_cpu(Tokens& in, const PolicyObjective& objective, const Normalizer& normalizer = {}) {
  const auto n = static_cast<size_t>(in.count());
  Found out{{}, std::vector<float>(n), std::vector<float>(n), in.logits};
  std::vector<int64_t> targets = in.targets;
  for (size_t i = 0; i < n; ++i) {
    if (in.batch.mask[i] == 0) targets[i] = in.options.ignore_index;
  }
  std::vector<RowStatistics> statistics(n);
  const auto logits = in.view<const void>(in.logits);
  row_statistics(logits, targets.data(), in.options, statistics.data());
  for (size_t i = 0; i < n; ++i) {
    out.logps[i] = static_cast<float>(logp(statistics[i], in.options));
    out.entropies[i] = static_cast<float>(entropy(statistics[i]));
  }
  std::vector<float> dlogps(n), dentropies(n);
  PolicyArrays arrays = in.arrays();
  arrays.logps = column_of<const void>(out.logps.data(), in);
  arrays.entropies = column_of<const void>(out.entropies.data(), in);
  out.totals =
      policy_loss(arrays, objective, normalizer,
                  {column_of<void>(dlogps.data(), in), column_of<void>(dentropies.data(), in)});
  const std::vector<double> upstream(dlogps.begin(), dlogps.end()),
      of_entropies(dentropies.begin(), dentropies.end());
  row_gradients(logits, targets.data(), in.options, statistics.data(), upstream.data(),
                of_entropies.data(), in.view<void>(out.gradient));
  if (in.leaves >= 0) {
    const auto leaves = static_cast<size_t>(in.leaves);
    out.logps[leaves] = out.entropies[leaves] = 0;
  }
  return out;
}

// body.operator()<Stored, kCapped>()
template <class Body>
void with_types(DType dtype, bool capped, Body body) {
  const auto with = [&]<class Stored>(Stored) {
    capped ? body.template operator()<Stored, true>() : body.template operator()<Stored, false>();
  };
  if (dtype == DType::float32) with(float{});
  if (dtype == DType::bfloat16) with(BFloat16{});
  if (dtype == DType::float16) with(Float16{});
}

struct TokensLaunch : HostLaunch<OneThread, OwnSurrogate> {
  Tokens& tokens_of_call;
  cuda::TokensOfLogits found;
  MutableLogits dlogits;
  bool clusters = true;

  void tokens(const Surrogate& surrogate, const cuda::PolicyParameters& in) const {
    const auto* own = surrogate.target<OwnSurrogate>();
    own ? tokens_by(*own, in) : tokens_by(cuda::CataloguedSurrogate(surrogate), in);
  }
  template <class Formula>
  void tokens_by(const Formula& formula, const cuda::PolicyParameters& in) const {
    Tokens& t = tokens_of_call;
    with_types(t.logits.dtype, t.options.softcap > 0, [&]<class Stored, bool kCapped>() {
      const HostCluster<cuda::kHeldThreads> team{
          cuda::blocks_of_held_row<Stored, kCapped>(t.vocabulary, clusters), run.team.backwards};
      const auto rows =
          cuda::row_parameters<kCapped>(t.view<const void>(t.logits), t.targets.data(), t.options);
      for (int64_t i = 0; i < t.count(); ++i) {
        const int64_t token = run.team.backwards ? t.count() - 1 - i : i;
        cuda::token_of_logits_program<Stored, kCapped, cuda::kHeldVectors<Stored, kCapped>>(
            team, formula, in, rows, token, found, dlogits);
      }
    });
  }
};

struct Way {
  bool in_place = true, backwards = false, clusters = true;
  const double* counts = nullptr;
  double factor = 1;
};

Found by_program(const Tokens& tokens, const PolicyObjective& objective, const Way& way = {}) {
  Tokens in = tokens;
  const auto n = static_cast<size_t>(in.count());
  Found out{{}, std::vector<float>(n, 7), std::vector<float>(n, 7), in.logits};
  PolicyArrays arrays = in.arrays();
  arrays.logps = column_of<const void>(out.logps.data(), in);
  arrays.entropies = column_of<const void>(out.entropies.data(), in);
  const int64_t bytes = cuda::PolicyWorkspace(nullptr, arrays.layout, objective).bytes;
  std::vector<double> memory(static_cast<size_t>(bytes + 7) / 8);
  const TokensLaunch launch{{arrays.layout.rows, {{way.backwards}}},
                            in,
                            {out.logps.data(), out.entropies.data()},
                            in.view<void>(way.in_place ? in.logits : out.gradient),
                            way.clusters};
  cuda::run_logits_policy_loss(
      arrays, objective, way.counts, way.factor, reinterpret_cast<cuda::FlatTotals*>(&out.totals),
      cuda::PolicyWorkspace(memory.data(), arrays.layout, objective), launch);
  if (way.in_place) out.gradient = in.logits;
  return out;
}

void expect_same_tokens(const Found& got, const Found& want, const std::string& what) {
  for (size_t i = 0; i < want.logps.size(); ++i) {
    ASSERT_NEAR(got.logps[i], want.logps[i], 3e-6 * (1 + std::abs(want.logps[i]))) << what;
    ASSERT_NEAR(got.entropies[i], want.entropies[i], 5e-6 * (1 + want.entropies[i])) << what;
  }
  EXPECT_NEAR(got.totals.loss, want.totals.loss, 2e-5 * (1e-2 + std::abs(want.totals.loss)))
      << what;
  const auto metrics = got.totals.metrics.to_map(), expected = want.totals.metrics.to_map();
  for (const auto& [name, value] : expected) {
    EXPECT_NEAR(metrics.at(name), value, 1e-4 * (1e-2 + std::abs(value))) << what << ": " << name;
  }
}

// Of the gradients; what is no token's column stays as it was, and they begin as the logits.
void expect_same(const Tokens& tokens, Found got, Found want, const std::string& what) {
  expect_same_tokens(got, want, what);
  const DType dtype = want.gradient.dtype;
  double largest = 0;
  for (int64_t i = 0; i < tokens.count(); ++i) {
    const double of_target =
        want.gradient.get(tokens.place(i, tokens.targets[static_cast<size_t>(i)]));
    largest = std::max(largest, std::abs(of_target));
  }
  const auto size = static_cast<int64_t>(want.gradient.words.size());
  const auto values = want.gradient.values(size), found = got.gradient.values(size);
  for (size_t i = 0; i < values.size(); ++i) {
    ASSERT_NEAR(found[i], values[i], 2.02 * rows_test::rounding(dtype, values[i]) + 2e-5 * largest)
        << what << " at " << i;
  }
}

void expect_cpu_kernels(Tokens tokens, const PolicyObjective& objective, const std::string& what) {
  const Found want = by_cpu(tokens, objective);
  const Found got = by_program(tokens, objective);
  expect_same(tokens, got, want, what);
  const Found apart = by_program(tokens, objective, {.in_place = false, .backwards = true});
  EXPECT_EQ(apart.gradient.words, got.gradient.words) << what;
  EXPECT_EQ(apart.totals.metrics.sums, got.totals.metrics.sums) << what;
  EXPECT_EQ(apart.logps, got.logps) << what;
}

constexpr DType kDeviceTypes[] = {DType::float32, DType::bfloat16, DType::float16};

std::string name(DType dtype, int64_t vocabulary) {
  return std::string(name_of(dtype)) + " " + std::to_string(vocabulary);
}

TEST(LogitsPolicyProgram, EveryRowOfTheCatalogueIsThatOfTheCpuKernels) {
  for (const CatalogueRow& row : kCatalogue) {
    const PolicyObjective objective = row.preset();
    if (!cuda::is_of_own_logits(objective)) continue;
    expect_cpu_kernels(Tokens(DType::float32, 3, 5, 300), objective, std::string(row.name));
  }
}

TEST(LogitsPolicyProgram, AFormulaOfAUsersIsThatOfTheCpuKernels) {
  PolicyObjective objective = presets::grpo(0.04);
  objective.surrogate = OwnSurrogate{.strength = 0.7};
  for (DType dtype : kDeviceTypes) {
    expect_cpu_kernels(Tokens(dtype, 3, 5, 300), objective, name(dtype, 300));
  }
}

TEST(LogitsPolicyProgram, RowsMayLieAnywhere) {
  for (DType dtype : kDeviceTypes) {
    for (int64_t vocabulary : {1, 7, 8, 33, 1025}) {
      for (int64_t first : {0, 1, 8}) {
        const std::string what = name(dtype, vocabulary) + " from " + std::to_string(first);
        expect_cpu_kernels(Tokens(dtype, 2, 3, vocabulary, first, 3), presets::grpo(0.04), what);
      }
      expect_cpu_kernels(Tokens(dtype, 2, 3, vocabulary, 1, 3, 2), presets::ppo(), "strided");
    }
  }
}

// 16 bytes at a time go where they are aligned on both sides.
TEST(LogitsPolicyProgram, VectorsAreAlignedOnBothSides) {
  alignas(16) float memory[64] = {};
  const auto vectors = [&](int from, int to) {
    const ConstLogits logits{memory + from, DType::float32, 1, 30, 30};
    const MutableLogits out{memory + to, DType::float32, 1, 30, 30};
    return cuda::RowMemory<float>(logits, out, 0).parts.vectors;
  };
  EXPECT_EQ(vectors(0, 4), 7);
  EXPECT_EQ(vectors(1, 5), 6);
  EXPECT_EQ(vectors(0, 1), 0);
}

// One block, several, more than they hold; on a device without clusters.
TEST(LogitsPolicyProgram, RowsMayBeOfAnyLength) {
  for (DType dtype : kDeviceTypes) {
    for (int64_t vocabulary : {20480, 32001, 90000, 163840, 170007}) {
      Tokens tokens(dtype, 1, 3, vocabulary);
      const PolicyObjective objective = presets::ppo();
      const Found want = by_cpu(tokens, objective);
      for (bool clusters : {true, false}) {
        expect_same(tokens, by_program(tokens, objective, {.clusters = clusters}), want,
                    name(dtype, vocabulary));
      }
    }
  }
}

TEST(LogitsPolicyProgram, AClusterIsAsSmallAsHoldsARow) {
  const auto blocks = [](int64_t vocabulary) {
    return cuda::blocks_of_held_row<BFloat16, false>(vocabulary, true);
  };
  EXPECT_EQ(blocks(20480), 1);
  EXPECT_EQ(blocks(20481), 2);
  EXPECT_EQ(blocks(151936), 8);
  EXPECT_EQ(blocks(1 << 20), 8);
  EXPECT_EQ((cuda::blocks_of_held_row<float, false>(151936, true)), 8);
  EXPECT_EQ((cuda::blocks_of_held_row<float, false>(151936, false)), 1);
}

TEST(LogitsPolicyProgram, OptionsOfRowsAreThoseOfTheCpuKernels) {
  for (DType dtype : kDeviceTypes) {
    for (double softcap : {0.0, 5.0}) {
      Tokens tokens(dtype, 2, 4, 9000);
      tokens.options = {.temperature = 0.7, .scale = 1.3, .softcap = softcap};
      tokens.move_near();
      tokens.targets[3] = tokens.options.ignore_index;
      PolicyObjective objective = presets::grpo(0.1);
      objective.entropy.coefficient = 0.3;
      tokens.entropy_weights.assign(8, 1.5f);
      expect_cpu_kernels(tokens, objective, name(dtype, 9000));
    }
  }
}

TEST(LogitsPolicyProgram, PenaltiesAndWeightsAreThoseOfTheCpuKernels) {
  Tokens tokens(DType::float32, 3, 5, 300);
  tokens.batch.kl_weights.assign(15, 1.5f);
  tokens.batch.token_weights.assign(15, 0.75f);
  tokens.batch.mask[7] = 1;
  tokens.batch.rollout_logps[7] += 3;
  tokens.leaves = 7;
  for (const KlReference reference :
       {KlReference::reference, KlReference::old, KlReference::rollout}) {
    PolicyObjective objective = presets::grpo(0.3);
    objective.kl.reference = reference;
    objective.kl.correction = KlCorrection::ratio;
    objective.weights = {TokenWeight(RatioGate{}, WeightLevel::token),
                         TokenWeight(TruncatedImportance{}, WeightLevel::sequence_sum)};
    expect_cpu_kernels(tokens, objective, "weights");
  }
}

TEST(LogitsPolicyProgram, WithoutAnOldPolicyTheRatioIsOne) {
  Tokens tokens(DType::float32, 2, 4, 50);
  tokens.batch.old_logps.clear();
  for (const KlReference reference : {KlReference::reference, KlReference::old}) {
    PolicyObjective objective = presets::grpo(0.3);
    objective.kl.reference = reference;
    expect_cpu_kernels(tokens, objective, "no old_logps");
  }
}

TEST(LogitsPolicyProgram, EveryAggregationIsThatOfTheCpuKernels) {
  Tokens tokens(DType::float32, 3, 5, 60);
  for (bool given : {false, true}) {
    if (given) tokens.row_tokens = {4, 3, 9};
    for (size_t mode = 0; mode < kAggregationNames.size(); ++mode) {
      PolicyObjective objective = presets::grpo(0.1);
      objective.aggregation = {static_cast<Aggregation::Mode>(mode), 900};
      expect_cpu_kernels(tokens, objective, std::string(kAggregationNames[mode]));
    }
  }
}

TEST(LogitsPolicyProgram, CountsOfTheStepAndItsFactorAreThoseOfTheNormalizer) {
  Tokens tokens(DType::float32, 3, 5, 60);
  const Normalizer normalizer{.policy = 90, .kl = 70, .sequences = 11, .world_size = 4};
  const double counts[] = {90, 70, 11};
  for (const Aggregation& aggregation : {token_mean(), sequence_mean_token_mean()}) {
    PolicyObjective objective = presets::grpo(0.1);
    objective.aggregation = aggregation;
    const Found want = by_cpu(tokens, objective, normalizer);
    expect_same(tokens, by_program(tokens, objective, {.counts = counts, .factor = 4}), want,
                "counts");
  }
}

TEST(LogitsPolicyProgram, PackedRowsArePaddedOnes) {
  Tokens tokens(DType::bfloat16, 1, 12, 300);
  tokens.offsets = {0, 0, 1, 1, 7, 12, 12};
  for (const PolicyObjective& objective : {presets::grpo(0.04), presets::dr_grpo()}) {
    expect_cpu_kernels(tokens, objective, "packed");
  }
  std::vector<int64_t> rows;
  for (int64_t i = 0; i < 12; ++i) rows.push_back(cuda::place_of(tokens.arrays().layout, i).row);
  EXPECT_EQ(rows, (std::vector<int64_t>{1, 3, 3, 3, 3, 3, 3, 4, 4, 4, 4, 4}));
}

TEST(LogitsPolicyProgram, MaskedTokensAreNotReadAndGetZeros) {
  Tokens tokens(DType::bfloat16, 2, 3, 100);
  tokens.batch.mask = {1, 0, 1, 1, 0, 1};
  for (int64_t token : {1, 4}) {
    for (int64_t column = 0; column < 100; ++column) tokens.set(token, column, kNan);
    tokens.targets[static_cast<size_t>(token)] = 1 << 20;
    for (auto* array : {&tokens.batch.old_logps, &tokens.batch.advantages}) {
      (*array)[static_cast<size_t>(token)] = NAN;
    }
  }
  Found got = by_program(tokens, presets::ppo());
  EXPECT_TRUE(std::isfinite(got.totals.loss));
  EXPECT_EQ(got.logps[1], 0);
  EXPECT_EQ(got.entropies[4], 0);
  for (int64_t column = 0; column < 100; ++column) {
    EXPECT_EQ(got.gradient.get(tokens.place(1, column)), 0);
    EXPECT_EQ(got.gradient.get(tokens.place(4, column)), 0);
  }
}

TEST(LogitsPolicyProgram, WhatIsNoNumberComesOutAndIsCounted) {
  Tokens tokens(DType::float32, 2, 3, 100);
  tokens.batch.mask.assign(6, 1);
  tokens.targets[0] = 100;
  tokens.targets[1] = -1;
  tokens.set(2, 50, kNan);
  tokens.batch.advantages[3] = INFINITY;
  Found got = by_program(tokens, presets::ppo());
  EXPECT_TRUE(std::isnan(got.totals.loss));
  EXPECT_EQ(got.totals.metrics.to_map().at("nonfinite"), 4 + 3);  // losses and entropies
  for (int64_t token = 0; token < 6; ++token) {
    for (int64_t column = 0; column < 100; ++column) {
      EXPECT_EQ(std::isnan(got.gradient.get(tokens.place(token, column))), token < 4) << token;
    }
  }
}

// Real threads, those of all tokens at once, in place: ThreadSanitizer looks for races, and the
// bits are those of such teams on one thread.
TEST(LogitsPolicyProgram, ThreadsOfATeamDoNotRace) {
  constexpr int kThreads = 64, kHeld = 2;
  Tokens tokens(DType::bfloat16, 1, 3, kThreads * 8 * kHeld + 1003);
  const PolicyArrays arrays = tokens.arrays();
  const double counts[] = {3, 3, 1};
  const auto in = cuda::policy_parameters(arrays, presets::ppo(), 1, counts, {});
  const cuda::CataloguedSurrogate formula(presets::ppo().surrogate);
  const auto run = [&](Memory& memory, std::vector<float>& logps, const auto& run_teams) {
    const auto rows = cuda::row_parameters<false>(tokens.view<const void>(memory),
                                                  tokens.targets.data(), tokens.options);
    run_teams([&](const auto& team, int token) {
      cuda::token_of_logits_program<BFloat16, false, kHeld>(
          team, formula, in, rows, token, {logps.data(), nullptr}, tokens.view<void>(memory));
    });
  };
  Memory by_threads = tokens.logits, alone = tokens.logits;
  std::vector<float> logps(3), expected(3);
  run(by_threads, logps, [](const auto& program) { ThreadTeam<kThreads>::run(3, program); });
  run(alone, expected, [](const auto& program) {
    for (int i = 0; i < 3; ++i) program(HostCluster<kThreads>{}, i);
  });
  EXPECT_EQ(logps, expected);
  EXPECT_EQ(by_threads.words, alone.words);
}

}  // namespace
}  // namespace tether
