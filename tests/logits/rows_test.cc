#include "logits/rows.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "core/bit_cast.h"
#include "tests/error_message.h"
#include "tests/logits/rows_reference.h"

namespace tether {
namespace {

using namespace rows_test;

// ---- value and gradient -------------------------------------------------------------------------

TEST(Rows, TwoLogitsByHand) {
  // p = (1/4, 3/4): dentropy/dx_1 = -p_1 (log p_1 + H) = -3/16 log 3, and the reverse for x_0.
  Batch batch = {.vocabulary = 2,
                 .logits = {0, std::log(3)},
                 .targets = {1},
                 .dlogps = {1},
                 .dentropies = {2}};
  const Result result = batch.run();
  EXPECT_NEAR(result.logps[0], std::log(0.75), 1e-15);
  EXPECT_NEAR(result.entropies[0], 0.25 * std::log(4) - 0.75 * std::log(0.75), 1e-15);
  EXPECT_NEAR(result.dlogits[0], -0.25 + 2 * 3.0 / 16 * std::log(3), 1e-15);
  EXPECT_NEAR(result.dlogits[1], +0.25 - 2 * 3.0 / 16 * std::log(3), 1e-15);
}

TEST(Rows, MatchTheDefinition) {
  for (DType dtype : kAllTypes) {
    for (int64_t vocabulary : {1, 2, 3, 17, 31, 32, 33, 2047, 2048, 2049, 32000}) {
      for (double scale : {1.0, 10.0}) {
        const Batch batch = random_batch(dtype, 3, vocabulary, scale);
        expect_close(batch.run(), reference(batch, dtype), batch, name(dtype, vocabulary));
      }
    }
  }
}

// What logits/rows.h says of a model's vocabulary: logp within 4 ulp of the largest logit, entropy
// within 1e-6 of itself, and both far better than torch's in the type of the logits.
TEST(Rows, PrecisionAtTheVocabularyOfAModel) {
  double worst_logp = 0, worst_entropy = 0;
  for (DType dtype : {DType::float32, DType::bfloat16}) {
    for (double scale : {1.0, 3.0, 10.0}) {
      const Batch batch = random_batch(dtype, 4, 151936, scale);
      const Result got = batch.run(), want = reference(batch, dtype);
      for (size_t row = 0; row < 4; ++row) {
        const double logp = std::abs(got.logps[row] - want.logps[row]);
        const double entropy = std::abs(got.entropies[row] - want.entropies[row]);
        EXPECT_LE(logp, 4 * 0x1p-23 * largest(batch.logits));
        EXPECT_LE(entropy, 1e-6 * want.entropies[row]);
        worst_logp = std::max(worst_logp, logp);
        worst_entropy = std::max(worst_entropy, entropy);
      }
    }
  }
  RecordProperty("logp_error", std::to_string(worst_logp * 1e9) + "e-9");
  RecordProperty("entropy_error", std::to_string(worst_entropy * 1e9) + "e-9");
  EXPECT_LE(worst_logp, 5e-7);
  EXPECT_LE(worst_entropy, 1e-6);
}

// The reference logit is guessed from the first 32 and moves up while the row is read.
TEST(Rows, MatchTheDefinitionWhereTheReferenceMoves) {
  for (DType dtype : kAllTypes) {
    for (double spread : {4.0, 30.0, 300.0, 30000.0}) {
      Batch batch = random_batch(dtype, 4, 10000, 1);
      for (size_t i = 0; i < 10000; ++i) {
        const double ramp = spread * static_cast<double>(i) / 10000;
        batch.logits[i] += ramp;
        batch.logits[10000 + i] -= ramp;
        batch.logits[20000 + i] = i == 5000 ? spread : -spread;
        batch.logits[30000 + i] = i < 5000 ? -infinity : ramp;
      }
      batch.targets = {9990, 3, 5000, 9999};
      Batch finite = batch;  // for the size of the bounds
      std::replace(finite.logits.begin(), finite.logits.end(), -infinity, 0.0);
      expect_close(batch.run(), reference(batch, dtype), finite, name(dtype, 10000));
    }
  }
}

TEST(Rows, GradientIsTheDerivativeOfValue) {
  Batch batch = random_batch(DType::float64, 2, 37, 2);
  batch.options.temperature = 0.7;
  expect_derivative(batch, [](const Batch& at) { return at.run(); });
}

TEST(Rows, EitherUpstreamMayBeMissing) {
  expect_sum_of_upstreams(random_batch(DType::float64, 3, 50, 2),
                          [](const Batch& at) { return at.run(); });
}

TEST(Rows, GradientInPlaceIsTheSame) {
  for (DType dtype : kAllTypes) {
    const Batch batch = random_batch(dtype, 3, 2500, 3);
    const Doubles want = batch.run().dlogits;
    Memory memory(dtype, batch.logits);
    EXPECT_EQ(batch.run_on(batch.view(memory), memory).dlogits, want);
  }
}

// ---- what holds for every row -------------------------------------------------------------------

TEST(Rows, ProbabilitiesSumToOne) {
  for (DType dtype : kAllTypes) {
    const Doubles row = normal(200, 5, 3);
    Batch batch = {.dtype = dtype, .vocabulary = 200, .logits = {}, .targets = {}};
    for (int64_t target = 0; target < 200; ++target) {
      batch.logits.insert(batch.logits.end(), row.begin(), row.end());
      batch.targets.push_back(target);
    }
    double sum = 0;
    for (double value : batch.run().logps) {
      EXPECT_LE(value, 0);
      sum += std::exp(value);
    }
    EXPECT_NEAR(sum, 1, dtype == DType::float64 ? 1e-14 : 1e-6);
  }
}

TEST(Rows, SignsHoldToTheLastBit) {
  for (DType dtype : kAllTypes) {
    for (int64_t vocabulary : {1, 2, 3, 40, 100}) {
      for (double scale : {1e-3, 0.1, 5.0, 30.0}) {
        Batch batch = random_batch(dtype, 400, vocabulary, scale);
        for (size_t row = 0; row < 400; ++row) {  // the largest logit, mostly near certainty
          const auto begin = batch.logits.begin() + static_cast<int64_t>(row) * vocabulary;
          batch.targets[row] = std::max_element(begin, begin + vocabulary) - begin;
        }
        const Result result = batch.run();
        for (size_t row = 0; row < 400; ++row) {
          ASSERT_LE(result.logps[row], 0) << name(dtype, vocabulary) << ", scale " << scale;
          ASSERT_GE(result.entropies[row], 0) << name(dtype, vocabulary) << ", scale " << scale;
        }
      }
    }
  }
}

TEST(Rows, CertainAndFlatRowsAreExact) {
  for (DType dtype : kAllTypes) {
    const Batch single = {.dtype = dtype, .vocabulary = 1, .logits = {-7.25}, .targets = {0}};
    EXPECT_EQ(single.run().logps[0], 0);
    EXPECT_EQ(single.run().entropies[0], 0);
    Batch certain = {.dtype = dtype,
                     .vocabulary = 3000,
                     .logits = Doubles(3000, -2000.0),
                     .targets = {2999},
                     .dlogps = {1},
                     .dentropies = {1}};
    certain.logits[2999] = 100;
    EXPECT_EQ(certain.run().logps[0], 0);
    EXPECT_EQ(certain.run().entropies[0], 0);
    EXPECT_EQ(certain.run().dlogits, Doubles(3000, 0.0));
    const Batch flat = {.dtype = dtype,
                        .vocabulary = 3000,
                        .logits = Doubles(3000, 4.5),
                        .targets = {7},
                        .dentropies = {1}};
    EXPECT_DOUBLE_EQ(flat.run().logps[0], -std::log(3000));
    EXPECT_DOUBLE_EQ(flat.run().entropies[0], std::log(3000));
    EXPECT_EQ(flat.run().dlogits, Doubles(3000, 0.0));
  }
}

TEST(Rows, ShiftOfARowChangesNoBit) {
  Batch batch = random_batch(DType::float32, 3, 5000, 3);
  for (double& logit : batch.logits) logit = 8 * std::round(logit);  // exact after every shift
  const Result want = batch.run();
  for (double shift : {-1e8, 1e3, 1e8}) {
    Batch shifted = batch;
    for (double& logit : shifted.logits) logit += shift;
    const Result got = shifted.run();
    EXPECT_EQ(got.logps, want.logps) << shift;
    EXPECT_EQ(got.entropies, want.entropies) << shift;
    EXPECT_EQ(got.dlogits, want.dlogits) << shift;
  }
}

TEST(Rows, TemperatureDividesTheLogits) {
  for (double temperature : {0.3, 1.7, 1e-6, 1e6}) {
    Batch hot = random_batch(DType::float64, 3, 300, 2);
    hot.options.temperature = temperature;
    Batch divided = hot;
    divided.options.temperature = 1;
    for (double& logit : divided.logits) logit /= temperature;
    const Result got = hot.run(), want = divided.run();
    const double size = 1e-15 * (1 + largest(divided.logits));
    expect_near(got.logps, want.logps, 4 * size, "logp");
    expect_near(got.entropies, want.entropies, 16 * size, "entropy");
    for (size_t i = 0; i < got.dlogits.size(); ++i) {
      ASSERT_NEAR(got.dlogits[i] * temperature, want.dlogits[i], 16 * size);
    }
  }
}

TEST(Rows, ScaleAndSoftcapOfTheLogits) {
  for (DType dtype : kAllTypes) {
    for (double softcap : {0.0, 5.0, 30.0}) {
      for (double scale : {0.0625, 1.0, 3.0}) {
        for (double temperature : {0.5, 1.0}) {
          Batch batch = random_batch(dtype, 3, 2500, 8);
          batch.logits[7] = batch.logits[2600] = -infinity;
          batch.options.scale = scale;
          batch.options.softcap = softcap;
          batch.options.temperature = temperature;
          Batch finite = batch;
          finite.logits[7] = finite.logits[2600] = 0;
          expect_close(batch.run(), reference(batch, dtype), finite,
                       name(dtype, 2500) + ", softcap " + std::to_string(softcap));
        }
      }
    }
  }
}

TEST(Rows, SoftcapKeepsTheSigns) {
  for (DType dtype : kAllTypes) {
    Batch batch = random_batch(dtype, 400, 3, 40);
    batch.options.softcap = 30;
    for (size_t row = 0; row < 400; ++row) {
      const auto begin = batch.logits.begin() + static_cast<int64_t>(row) * 3;
      batch.targets[row] = std::max_element(begin, begin + 3) - begin;
    }
    const Result result = batch.run();
    for (size_t row = 0; row < 400; ++row) {
      ASSERT_LE(result.logps[row], 0);
      ASSERT_GE(result.entropies[row], 0);
    }
  }
}

// ---- further statistics -------------------------------------------------------------------------

TEST(Rows, AllStatistics) {
  for (DType dtype : kAllTypes) {
    for (double softcap : {0.0, 20.0}) {
      Batch batch = random_batch(dtype, 4, 3001, 3);
      batch.options = {.temperature = 0.8, .scale = 1.5, .softcap = softcap, .sums = RowSums::all};
      batch.logits[5] = -infinity;
      for (size_t v = 2100; v < 3001; ++v) batch.logits[3001 + v] += 10;  // the reference moves
      batch.logits[17] = 40;  // the largest of row 0, tied with its target
      batch.targets = {2900, 1, 2, 3};
      batch.logits[2900] = 40;
      Memory memory(dtype, batch.logits);
      std::vector<RowStatistics> rows(4);
      row_statistics(batch.view(memory), batch.targets.data(), batch.options, rows.data());
      for (size_t row = 0; row < 4; ++row) {
        double squares = 0, sum = 0, count = 0, max = -infinity;
        std::vector<double> x;
        for (size_t v = 0; v < 3001; ++v) {
          const double logit = 1.5 * memory.get(row * 3001 + v);
          const bool capped = softcap > 0 && logit > -infinity;
          x.push_back((capped ? softcap * std::tanh(logit / softcap) : logit) / 0.8);
          max = std::max(max, x.back());
        }
        double total = 0;
        for (double v : x) total += std::exp(v - max);
        for (double v : x) squares += std::exp(2 * (v - max)) / (total * total);
        for (double v : x) {
          if (v == -infinity) continue;
          sum += v;
          ++count;
        }
        const double bound = dtype == DType::float64 ? 1e-13 : 2e-6;
        EXPECT_NEAR(sum_of_squared_p(rows[row]) / squares, 1, 4 * bound);
        EXPECT_NEAR(mean_logit(rows[row], batch.options), sum / count, bound);
        EXPECT_EQ(target_is_largest(rows[row]), row == 0) << row;
        EXPECT_EQ(rows[row].columns, row == 0 ? 3000 : 3001);
      }
    }
  }
}

// Wherever NaN is: comparisons pass it over in one lane and not in another.
TEST(Rows, NoTargetIsTheLargestOfABrokenRow) {
  const double nan = std::numeric_limits<double>::quiet_NaN();
  for (size_t columns : {2, 9, 40, 700}) {
    Batch batch = random_batch(DType::float32, 2, static_cast<int64_t>(columns), 3);
    for (size_t place = 0; place < columns; ++place) {
      for (const double broken : {nan, infinity}) {
        Doubles& logits = batch.logits;
        logits.assign(2 * columns, 0);
        logits[place] = broken;
        std::fill(logits.begin() + static_cast<std::ptrdiff_t>(columns), logits.end(), -infinity);
        batch.targets = {static_cast<int64_t>(place == 0), 0};
        Memory memory(batch.dtype, logits);
        std::vector<RowStatistics> rows(2);
        row_statistics(batch.view(memory), batch.targets.data(), batch.options, rows.data());
        EXPECT_FALSE(target_is_largest(rows[0])) << columns << " " << place << " " << broken;
        EXPECT_FALSE(target_is_largest(rows[1]));
      }
    }
  }
}

TEST(Rows, LogpsOfSeveralIds) {
  for (DType dtype : kAllTypes) {
    Batch batch = random_batch(dtype, 3, 2100, 2);
    batch.options.temperature = 0.7;
    batch.options.softcap = 5;
    Memory memory(dtype, batch.logits);
    std::vector<RowStatistics> statistics(3);
    const int64_t ids[] = {4, 0, 2099, 7, 7, 1};
    row_statistics(batch.view(memory), nullptr, batch.options, statistics.data());
    Doubles got(6);
    row_logps(batch.view(memory), statistics.data(), ids, 2, batch.options, got.data());
    for (size_t i = 0; i < 6; ++i) {
      batch.targets.assign(3, ids[i]);
      EXPECT_EQ(got[i], batch.run().logps[i / 2]) << i;
    }
    // Every third column of every second row of something larger.
    Memory wide(dtype, Doubles(3 * 2 * 3 * 2100, 9.0));
    const ConstLogits strided{wide.words.data(), dtype, 3, 2100, 2 * 3 * 2100, 3};
    for (int64_t i = 0; i < 3 * 2100; ++i) {
      wide.set(static_cast<size_t>(strided.offset(i / 2100) + i % 2100 * 3),
               batch.logits[static_cast<size_t>(i)]);
    }
    Doubles same(6);
    row_logps(strided, statistics.data(), ids, 2, batch.options, same.data());
    EXPECT_EQ(same, got);
    const int64_t bad[] = {0, 1, 2, 2100, 4, 5};
    EXPECT_EQ(message([&] {
                row_logps(batch.view(memory), statistics.data(), bad, 2, batch.options, got.data());
              }),
              "row_logps: ids must be in [0, 2100), got 2100 at [1, 1]");
  }
}

TEST(Rows, WhatIsNotAskedForIsNan) {
  const Batch batch = random_batch(DType::float32, 1, 100, 1);
  Memory memory(DType::float32, batch.logits);
  RowStatistics few, some, all;
  const auto run = [&](RowSums sums, RowStatistics& out) {
    row_statistics(batch.view(memory), batch.targets.data(), {.sums = sums}, &out);
  };
  run(RowSums::logp, few);
  run(RowSums::entropy, some);
  run(RowSums::all, all);
  EXPECT_EQ(logp(few, {}), logp(all, {}));
  EXPECT_EQ(entropy(some), entropy(all));
  EXPECT_TRUE(std::isnan(few.weighted_sum) && std::isnan(entropy(few)));
  EXPECT_TRUE(std::isnan(sum_of_squared_p(some)) && std::isnan(mean_logit(some, {})));
  // The gradient of logp alone needs no more than its sum.
  const double dlogp = 0.3;
  Memory want(DType::float32, 100), got(DType::float32, 100);
  const MutableLogits views[] = {{want.words.data(), DType::float32, 1, 100, 100},
                                 {got.words.data(), DType::float32, 1, 100, 100}};
  row_gradients(batch.view(memory), batch.targets.data(), {}, &all, &dlogp, nullptr, views[0]);
  row_gradients(batch.view(memory), batch.targets.data(), {}, &few, &dlogp, nullptr, views[1]);
  EXPECT_EQ(got.values(100), want.values(100));
}

// ---- losses of rows -----------------------------------------------------------------------------

TEST(Rows, LossesOfRowsAreTheTwoPasses) {
  for (DType dtype : kAllTypes) {
    for (double softcap : {0.0, 10.0}) {
      Batch batch = random_batch(dtype, 5, 2500, 3);
      batch.options.softcap = softcap;
      batch.targets[1] = batch.options.ignore_index;
      batch.dlogps[2] = batch.dentropies[2] = 0;
      const Result want = batch.run();
      for (bool in_place : {false, true}) {
        Memory memory(dtype, batch.logits);
        Memory gradient(dtype, Doubles(5 * 2500, 7.0));
        Memory& out = in_place ? memory : gradient;
        struct Context {
          const Batch& batch;
          Doubles logps, entropies;
        } context{batch, Doubles(5), Doubles(5)};
        const auto loss = [](void* argument, int64_t row, const RowStatistics& statistics) {
          Context& in = *static_cast<Context*>(argument);
          const auto i = static_cast<size_t>(row);
          in.logps[i] = logp(statistics, in.batch.options);
          in.entropies[i] = entropy(statistics);
          return RowUpstream{in.batch.dlogps[i], in.batch.dentropies[i]};
        };
        row_losses(batch.view(memory), batch.targets.data(), batch.options, {loss, &context},
                   {out.words.data(), dtype, 5, 2500, 2500});
        EXPECT_EQ(context.logps, want.logps);
        EXPECT_EQ(context.entropies, want.entropies);
        EXPECT_EQ(out.values(5 * 2500), want.dlogits) << in_place;
      }
    }
  }
}

// A gradient of more than 4 MB is stored past the caches, from any address.
TEST(Rows, LargeGradientsAreTheSameBits) {
  constexpr int64_t kVocabulary = 70001;
  const Batch batch = random_batch(DType::float32, 16, kVocabulary, 3);
  Memory memory(DType::float32, batch.logits);
  Memory gradient(DType::float32, batch.rows() * kVocabulary + 16);
  const Doubles want = [&] {
    Memory in_place(DType::float32, batch.logits);
    return batch.run_on(batch.view(in_place), in_place).dlogits;
  }();
  for (int64_t shift : {0, 1, 5}) {
    gradient = Memory(DType::float32, Doubles(want.size() + 16, -1.0));
    std::vector<RowStatistics> rows(16);
    row_statistics(batch.view(memory), batch.targets.data(), {}, rows.data());
    row_gradients(batch.view(memory), batch.targets.data(), {}, rows.data(), batch.dlogps.data(),
                  batch.dentropies.data(),
                  {gradient.as<float>() + shift, DType::float32, 16, kVocabulary, kVocabulary});
    for (size_t i = 0; i < want.size(); ++i) {
      ASSERT_EQ(gradient.get(i + static_cast<size_t>(shift)), want[i]) << shift << " at " << i;
    }
    ASSERT_EQ(gradient.get(want.size() + static_cast<size_t>(shift)), -1);
  }
}

TEST(Rows, GradientOfARowSumsToZeroAndIsBounded) {
  Batch batch = random_batch(DType::float64, 4, 3000, 4);
  batch.dentropies.clear();
  const Doubles gradient = batch.run().dlogits;
  for (size_t row = 0; row < 4; ++row) {
    const auto begin = gradient.begin() + static_cast<int64_t>(row) * 3000;
    EXPECT_NEAR(std::accumulate(begin, begin + 3000, 0.0), 0, 1e-14);
    EXPECT_LE(largest({begin, begin + 3000}), std::abs(batch.dlogps[row]) * (1 + 1e-15));
  }
}

TEST(Rows, PermutedVocabularyPermutesTheGradient) {
  const Batch batch = random_batch(DType::float64, 1, 3000, 3);
  std::vector<size_t> order(3000);
  std::iota(order.begin(), order.end(), size_t{0});
  std::shuffle(order.begin(), order.end(), std::mt19937(5));
  Batch permuted = batch;
  for (size_t i = 0; i < order.size(); ++i) permuted.logits[i] = batch.logits[order[i]];
  permuted.targets[0] =
      std::find(order.begin(), order.end(), static_cast<size_t>(batch.targets[0])) - order.begin();
  const Result want = batch.run(), got = permuted.run();
  expect_near(got.logps, want.logps, 1e-14, "logp");
  for (size_t i = 0; i < order.size(); ++i) {
    EXPECT_NEAR(got.dlogits[i], want.dlogits[order[i]], 1e-15);
  }
}

// ---- -inf, NaN, ignored rows --------------------------------------------------------------------

TEST(Rows, MinusInfinityIsADeletedColumn) {
  for (DType dtype : kAllTypes) {
    const Batch without = random_batch(dtype, 1, 6000, 3);
    Batch with = without;  // 3 more columns before each, and the first 2100 at once
    with.vocabulary = 4 * 6000 + 2100;
    with.logits = Doubles(static_cast<size_t>(with.vocabulary), -infinity);
    const auto column = [](size_t v) { return 2100 + 4 * v + 3; };
    for (size_t v = 0; v < 6000; ++v) with.logits[column(v)] = without.logits[v];
    with.targets = {static_cast<int64_t>(column(static_cast<size_t>(without.targets[0])))};
    const Result want = without.run(), got = with.run();
    const double bound = dtype == DType::float64 ? 1e-14 : 1e-6;
    EXPECT_NEAR(got.logps[0], want.logps[0], bound);
    EXPECT_NEAR(got.entropies[0], want.entropies[0], 4 * bound);
    for (size_t v = 0; v < 6000; ++v) {
      EXPECT_NEAR(got.dlogits[column(v)], want.dlogits[v],
                  4 * bound + 2 * rounding(dtype, want.dlogits[v]));
    }
    for (size_t i = 0; i < got.dlogits.size(); ++i) {
      ASSERT_TRUE(with.logits[i] != -infinity || got.dlogits[i] == 0) << i;
    }
  }
}

TEST(Rows, TargetOfMinusInfinity) {
  const Batch batch = {.vocabulary = 3, .logits = {0, -infinity, 0}, .targets = {1}, .dlogps = {2}};
  const Result result = batch.run();
  EXPECT_EQ(result.logps[0], -infinity);
  EXPECT_EQ(result.entropies[0], std::log(2));
  EXPECT_EQ(result.dlogits, (Doubles{-1, 0, -1}));
}

TEST(Rows, BadRowIsNanAndItsNeighboursAreNot) {
  for (DType dtype : kAllTypes) {
    for (const auto& [poison, softcap] : std::vector<std::pair<double, double>>{
             {kNan, 0}, {infinity, 0}, {-infinity, 0}, {kNan, 5}, {infinity, 5}, {-infinity, 5}}) {
      Batch clean = random_batch(dtype, 3, 2500, 1);
      clean.options.softcap = softcap;
      Batch bad = clean;
      // One NaN or +inf is enough; a row is empty only when all of it is -inf.
      const int64_t begin = poison == -infinity ? 2500 : 2500 + 2400;
      std::fill(bad.logits.begin() + begin, bad.logits.begin() + 5000, poison);
      const Result got = bad.run(), want = clean.run();
      EXPECT_TRUE(std::isnan(got.logps[1]) && std::isnan(got.entropies[1])) << poison;
      for (size_t i = 2500; i < 5000; ++i) ASSERT_TRUE(std::isnan(got.dlogits[i])) << poison;
      for (size_t row : {size_t{0}, size_t{2}}) {
        EXPECT_EQ(got.logps[row], want.logps[row]);
        const auto offset = static_cast<int64_t>(row) * 2500;
        EXPECT_TRUE(std::equal(got.dlogits.begin() + offset, got.dlogits.begin() + offset + 2500,
                               want.dlogits.begin() + offset));
      }
    }
  }
}

// A NaN of any bits, in any kind of pass.
TEST(Rows, EveryNanIsNoticed) {
  for (uint32_t bits : {0x7FC00000u, 0xFFC00000u, 0x7FC00001u, 0xFFC001FFu, 0x7F800001u}) {
    for (RowSums sums : {RowSums::logp, RowSums::entropy, RowSums::all}) {
      std::vector<float> logits(3000, 1.0f);
      logits[2777 - 64] = 5;  // in the lane of the NaN, before it
      logits[2777] = bit_cast<float>(bits);
      const ConstLogits view{logits.data(), DType::float32, 1, 3000, 3000};
      const int64_t target = 5;
      RowStatistics row;
      row_statistics(view, &target, {.sums = sums}, &row);
      EXPECT_TRUE(std::isnan(logp(row, {}))) << bits;
      EXPECT_TRUE(std::isnan(mean_logit(row, {}))) << bits;
      EXPECT_TRUE(sums != RowSums::all || row.max_logit == 5) << bits;
      std::vector<float> gradient(3000);
      const double dlogp = 1;
      row_gradients(view, &target, {}, &row, &dlogp, nullptr,
                    {gradient.data(), DType::float32, 1, 3000, 3000});
      EXPECT_TRUE(std::isnan(gradient[0]) && std::isnan(gradient[2777]));
    }
  }
}

// The gradient of a row with a NaN of any bits is NaN at every column, of any type, in any half of
// a pair.
TEST(Rows, GradientsOfABadRowAreNan) {
  for (DType dtype : kAllTypes) {
    for (size_t place : {size_t{0}, size_t{1}, size_t{17}, size_t{2999}}) {
      for (bool negative : {false, true}) {
        Batch batch = random_batch(dtype, 1, 3000, 1);
        batch.logits[place] = negative ? -kNan : kNan;
        for (bool of_entropy : {false, true}) {
          batch.dlogps = {of_entropy ? 0.0 : 1.0};
          batch.dentropies = {of_entropy ? 1.0 : 0.0};
          const Result got = batch.run();
          EXPECT_TRUE(std::isnan(got.logps[0]) && std::isnan(got.entropies[0]));
          for (double each : got.dlogits) ASSERT_TRUE(std::isnan(each)) << name(dtype, 3000);
        }
        batch.options.sums = RowSums::logp;
        EXPECT_TRUE(std::isnan(batch.run().logps[0]));
      }
    }
  }
}

// Halves round a NaN of any bits to a NaN.
TEST(Rows, NanUpstreamMakesTheGradientNan) {
  for (DType dtype : kAllTypes) {
    for (uint64_t bits : {0x7FF8000000000000u, 0x7FFFFFFFFFFFFFFFu, 0xFFFFFFFFFFFFFFFFu}) {
      Batch batch = random_batch(dtype, 1, 300, 1);
      batch.dlogps = {bit_cast<double>(bits)};
      for (double each : batch.run().dlogits) ASSERT_TRUE(std::isnan(each)) << name(dtype, 300);
    }
  }
}

TEST(Rows, IgnoredAndUnweightedRowsMayHoldAnything) {
  Batch batch = random_batch(DType::float32, 3, 100, 1);
  std::fill(batch.logits.begin() + 100, batch.logits.end(), kNan);
  batch.options.ignore_index = -7;
  batch.targets[1] = -7;
  batch.dlogps[1] = kNan;  // of an ignored row
  batch.dlogps[2] = batch.dentropies[2] = 0;
  const Result result = batch.run();
  EXPECT_EQ(result.logps[1], 0);
  EXPECT_EQ(result.entropies[1], 0);
  EXPECT_EQ(Doubles(result.dlogits.begin() + 100, result.dlogits.end()), Doubles(200, 0.0));
}

// ---- errors -------------------------------------------------------------------------------------

TEST(Rows, BadInputIsRefused) {
  const auto run = [](Batch batch) { return message([&] { batch.run(); }); };
  const Batch good = random_batch(DType::float32, 3, 8, 1);
  EXPECT_EQ(run(good), "no error");
  Batch bad = good;
  bad.targets[1] = 8;
  EXPECT_EQ(run(bad),
            "row_statistics: targets must be in [0, 8) or ignore_index -100, got 8 at [1]");
  bad.targets[1] = -1;
  EXPECT_EQ(run(bad),
            "row_statistics: targets must be in [0, 8) or ignore_index -100, got -1 at [1]");
  bad = good;
  bad.options.temperature = 0;
  EXPECT_EQ(run(bad), "row_statistics: temperature must be in [1e-06, 1e+06], got 0");
  bad = good;
  bad.options.scale = -1;
  EXPECT_EQ(run(bad), "row_statistics: scale must be in [1e-06, 1e+06], got -1");
  bad = good;
  bad.options.softcap = -2;
  EXPECT_EQ(run(bad), "row_statistics: softcap must be in [0, 1e+06], got -2");
  bad = good;
  bad.options.ids = 20;
  bad.options.first_id = 13;
  EXPECT_EQ(run(bad), "row_statistics: first_id must be in [0, 12], got 13");
  bad = good;
  bad.vocabulary = 0;
  EXPECT_EQ(run(bad), "row_statistics: logits must have a vocabulary of at least 1, got 0");
  float logits[4] = {};
  const int64_t target = 0;
  RowStatistics row;
  EXPECT_EQ(message([&] { row_statistics({logits, DType::boolean, 1, 4}, &target, {}, &row); }),
            "row_statistics: logits must be float32, float64, bfloat16 or float16, got boolean");
}

TEST(Rows, NoRowsIsFine) {
  const Batch batch = {.dtype = DType::float32, .vocabulary = 8, .logits = {}, .targets = {}};
  EXPECT_TRUE(batch.run().logps.empty());
}

}  // namespace
}  // namespace tether
