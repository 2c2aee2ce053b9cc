#include "core/rows.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "tests/core/rows_reference.h"
#include "tests/error_message.h"

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
  const Doubles gradient = batch.run().dlogits;
  const auto objective = [&](const Batch& at) {
    const Result result = at.run();
    double sum = 0;
    for (size_t row = 0; row < 2; ++row) {
      sum += batch.dlogps[row] * result.logps[row] + batch.dentropies[row] * result.entropies[row];
    }
    return sum;
  };
  const double step = 1e-5;
  for (size_t i = 0; i < gradient.size(); ++i) {
    Batch up = batch, down = batch;
    up.logits[i] += step;
    down.logits[i] -= step;
    EXPECT_NEAR(gradient[i], (objective(up) - objective(down)) / (2 * step), 1e-9) << i;
  }
}

TEST(Rows, EitherUpstreamMayBeMissing) {
  const Batch both = random_batch(DType::float64, 3, 50, 2);
  Batch values = both, entropies = both;
  values.dentropies.clear();
  entropies.dlogps.clear();
  Doubles sum = values.run().dlogits;
  const Doubles rest = entropies.run().dlogits;
  for (size_t i = 0; i < sum.size(); ++i) sum[i] += rest[i];
  expect_near(both.run().dlogits, sum, 1e-15, "sum of both");
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
    for (double poison : {kNan, infinity, -infinity}) {
      const Batch clean = random_batch(dtype, 3, 2500, 1);
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
