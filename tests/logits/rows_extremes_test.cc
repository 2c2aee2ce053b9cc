// Confident tokens, subnormal numbers and logits at the ends of their type, of logits/rows.h.

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "logits/rows.h"
#include "tests/logits/rows_reference.h"

namespace tether {
namespace {

using namespace rows_test;

constexpr RowSums kAllSums[] = {RowSums::logp, RowSums::entropy, RowSums::all};

double largest_of(DType dtype) {
  if (dtype == DType::float64) return std::numeric_limits<double>::max();
  if (dtype == DType::float16) return 65504;
  return dtype == DType::bfloat16 ? 0x1.FEp127 : double{std::numeric_limits<float>::max()};
}
double smallest_normal_of(DType dtype) {
  return dtype == DType::float64 ? std::numeric_limits<double>::min() : 0x1p-126;
}

// ---- confident tokens ---------------------------------------------------------------------------

// One row whose target stands `gap` above normal logits.
Batch confident_batch(DType dtype, int64_t vocabulary, int64_t target, double gap) {
  Batch batch = random_batch(dtype, 1, vocabulary, 0.5, static_cast<unsigned>(vocabulary));
  batch.targets = {target};
  batch.logits[static_cast<size_t>(target)] = gap;
  return batch;
}

struct Confident {
  long double rest = 0;      // of the sum, the target's term being 1
  long double distance = 0;  // sum of rest * log rest
};

Confident definition(const Batch& batch) {
  Memory stored(batch.dtype, batch.logits);
  const auto target = static_cast<size_t>(batch.targets[0]);
  Confident out;
  for (size_t v = 0; v < static_cast<size_t>(batch.vocabulary); ++v) {
    if (v == target) continue;
    const long double distance = stored.get(v) - static_cast<long double>(stored.get(target));
    out.rest += std::exp(distance);
    out.distance += std::exp(distance) * distance;
  }
  return out;
}

// Of a float term: its polynomial, and the rounding of its distance.
double relative_bound(DType dtype, double gap) {
  return dtype == DType::float64 ? 1e-13 : 1e-6 + 0x1p-24 * gap;
}

template <class Body>
void for_each_confident(Body body) {
  for (DType dtype : kAllTypes) {
    for (int64_t vocabulary : {2, 3, 31, 33, 255, 1023, 1024, 2048, 2049, 7000}) {
      for (int64_t target : {int64_t{0}, vocabulary / 2, vocabulary - 1}) {
        for (double gap : {20.0, 30.0, 40.0}) {
          SCOPED_TRACE(name(dtype, vocabulary) + ", target " + std::to_string(target) + ", gap " +
                       std::to_string(gap));
          body(confident_batch(dtype, vocabulary, target, gap), gap);
        }
      }
    }
  }
}

TEST(Rows, ConfidentTokensKeepTheirDistanceFromOne) {
  for_each_confident([](Batch batch, double gap) {
    const Confident want = definition(batch);
    const auto missing = static_cast<double>(want.rest / (1 + want.rest));
    const auto entropy =
        static_cast<double>(std::log1p(want.rest) - want.distance / (1 + want.rest));
    const double bound = relative_bound(batch.dtype, gap);
    for (RowSums sums : kAllSums) {
      batch.options.sums = sums;
      Batch of_logp = batch;
      of_logp.dentropies.clear();
      of_logp.dlogps = {1};
      const Result got = of_logp.run();
      EXPECT_NEAR(-std::expm1(got.logps[0]) / missing, 1, bound);
      if (sums != RowSums::logp) {
        EXPECT_NEAR(got.entropies[0] / entropy, 1, 2 * bound);
      }
      const auto target = static_cast<size_t>(batch.targets[0]);
      const double gradient = got.dlogits[target];
      EXPECT_NEAR(gradient, missing, missing * bound + rounding(batch.dtype, missing));
      double others = 0;
      for (size_t v = 0; v < got.dlogits.size(); ++v) others -= v == target ? 0 : got.dlogits[v];
      if (batch.dtype != DType::float16) {
        EXPECT_NEAR(others / missing, 1, bound + 0x1p-8);
      }
    }
  });
}

TEST(Rows, ConfidentTokensOfMergedShards) {
  for_each_confident([](const Batch& batch, double gap) {
    const Confident want = definition(batch);
    Memory memory(batch.dtype, batch.logits);
    const int64_t bytes =
        batch.dtype == DType::float64 ? 8 : (batch.dtype == DType::float32 ? 4 : 2);
    RowStatistics merged;
    const int64_t shards = std::min<int64_t>(3, batch.vocabulary);
    for (int64_t shard = 0; shard < shards; ++shard) {
      RowOptions options = {.ids = batch.vocabulary};
      options.first_id = batch.vocabulary * shard / shards;
      const int64_t end = batch.vocabulary * (shard + 1) / shards;
      RowStatistics part;
      row_statistics({memory.as<std::byte>() + options.first_id * bytes, batch.dtype, 1,
                      end - options.first_id},
                     batch.targets.data(), options, &part);
      merged = merge(merged, part, options);
    }
    const auto missing = static_cast<double>(want.rest / (1 + want.rest));
    EXPECT_NEAR(-std::expm1(logp(merged, {})) / missing, 1, relative_bound(batch.dtype, gap));
  });
}

// A later block outweighs the ones before by less than what makes a block be done again.
TEST(Rows, ConfidentTokensBesideAHighReference) {
  Batch batch = random_batch(DType::float32, 1, 5000, 0.1);
  batch.targets = {4500};
  for (size_t v = 1; v < 5000; ++v) batch.logits[v] -= 20;
  batch.logits[0] = 0;
  batch.logits[4500] = 5;
  const double missing = static_cast<double>(definition(batch).rest);
  EXPECT_NEAR(-std::expm1(batch.run().logps[0]) / (missing / (1 + missing)), 1, 2e-6);
}

// ---- subnormal numbers --------------------------------------------------------------------------

TEST(Rows, NoGradientIsSubnormal) {
  for (DType dtype : {DType::float32, DType::bfloat16, DType::float64}) {
    for (double softcap : {0.0, 1000.0}) {
      for (double upstream : {1e-5, 1.0, 1e5}) {
        Batch batch = random_batch(dtype, 6, 3000, dtype == DType::float64 ? 150 : 18);
        batch.options.softcap = softcap;
        for (double& each : batch.dlogps) each *= upstream;
        for (double& each : batch.dentropies) each *= upstream;
        batch.dlogps[0] = batch.dentropies[1] = 0;
        const Doubles got = batch.run().dlogits, want = reference(batch, dtype).dlogits;
        const double least = smallest_normal_of(dtype);
        int flushed = 0;
        for (size_t i = 0; i < got.size(); ++i) {
          ASSERT_TRUE(got[i] == 0 || std::abs(got[i]) >= least) << got[i] << " at " << i;
          if (got[i] == 0) ++flushed;
          // What is 0 is nothing next to a probability of 1.
          const double size = std::max(1.0, upstream);
          ASSERT_TRUE(got[i] != 0 || std::abs(want[i]) < 3000 * size * least) << want[i];
        }
        EXPECT_GT(flushed, 10);
      }
    }
  }
}

TEST(Rows, GradientsOfFloat16MayBeSubnormal) {
  Batch batch = {.dtype = DType::float16, .vocabulary = 2, .logits = {0, -13}, .targets = {0}};
  batch.dlogps = {1};
  EXPECT_NEAR(batch.run().dlogits[1], -std::exp(-13), 0x1p-24);
  EXPECT_NE(batch.run().dlogits[1], 0);
}

TEST(Rows, GradientOfACertainTargetIsNotSubnormal) {
  for (double distance : {80.0, 89.0, 100.0}) {
    Batch batch = {
        .dtype = DType::float32, .vocabulary = 2, .logits = {0, -distance}, .targets = {0}};
    batch.dlogps = {1};
    const double p = std::exp(-distance), want = p < 0x1p-126 ? 0 : p;
    const Doubles got = batch.run().dlogits;
    EXPECT_NEAR(got[0], want, 1e-5 * want);
    EXPECT_NEAR(got[1], -want, 1e-5 * want);
  }
}

TEST(Rows, SubnormalTermsAreNothing) {
  for (RowSums sums : kAllSums) {
    for (double distance : {87.0, 88.0, 95.0}) {
      Batch batch = {.dtype = DType::float32,
                     .vocabulary = 50,
                     .logits = Doubles(50, -distance),
                     .targets = {7}};
      batch.logits[7] = 0;
      batch.options.sums = sums;
      const double want = distance > 87.33 ? 0 : -49 * std::exp(-distance);
      EXPECT_NEAR(batch.run().logps[0], want, -1e-5 * want + 50 * 0x1p-126);
      Memory memory(batch.dtype, batch.logits);
      RowStatistics row;
      row_statistics(batch.view(memory), batch.targets.data(), batch.options, &row);
      if (sums == RowSums::all) {
        EXPECT_EQ(sum_of_squared_p(row), 1);
      }
    }
  }
}

// ---- logits at the ends of their type -----------------------------------------------------------

// Rows of logits of these values, in any order.
std::vector<Doubles> extreme_rows(DType dtype) {
  const double most = largest_of(dtype), much = std::min(most, 1e30);
  std::vector<Doubles> rows = {Doubles(70, -most), Doubles(70, most)};
  std::mt19937 generator(3);
  for (const Doubles& values : {Doubles{most, -most},
                                {0, -most},
                                {most, 0},
                                {much, -much},
                                {0, much, -much, most, -most, 1},
                                {0, -1e4, -infinity},
                                {-1e4, -infinity},
                                {0, -most, -infinity},
                                {0, 1, -1e4, -infinity}}) {
    for (size_t size : {size_t{70}, size_t{5000}}) {
      Doubles row(size);
      for (double& each : row) each = values[generator() % values.size()];
      rows.push_back(row);
    }
  }
  return rows;
}

TEST(Rows, FiniteLogitsGiveNoNan) {
  for (DType dtype : kAllTypes) {
    for (const Doubles& row : extreme_rows(dtype)) {
      for (double temperature : {1e-6, 1.0, 1e6}) {
        for (double scale : {1e-6, 1.0, 1e6}) {
          for (double softcap : {0.0, 1e-300, 1e-3, 30.0, 1e6}) {
            Batch batch = {.dtype = dtype,
                           .vocabulary = static_cast<int64_t>(row.size()),
                           .logits = row,
                           .targets = {3},
                           .options = {.temperature = temperature,
                                       .scale = scale,
                                       .softcap = softcap,
                                       .sums = RowSums::all}};
            batch.dlogps = {1e20};
            batch.dentropies = {-1e20};
            Memory memory(dtype, batch.logits);
            RowStatistics sums;
            row_statistics(batch.view(memory), batch.targets.data(), batch.options, &sums);
            const Result got = batch.run();
            const std::string what = name(dtype, batch.vocabulary) + ", first " +
                                     std::to_string(row[0]) + ", T " + std::to_string(temperature) +
                                     ", scale " + std::to_string(scale) + ", softcap " +
                                     std::to_string(softcap);
            ASSERT_LE(got.logps[0], 0) << what;
            ASSERT_GE(got.entropies[0], 0) << what;
            ASSERT_GE(sum_of_squared_p(sums), 0) << what;
            ASSERT_TRUE(std::isfinite(sums.logit_sum) || dtype == DType::float64) << what;
            for (double each : got.dlogits) ASSERT_FALSE(std::isnan(each)) << what;
          }
        }
      }
    }
  }
}

// Up to the end of the type.
TEST(Rows, AGradientIsAsLargeAsWhatArrives) {
  for (DType dtype : {DType::float32, DType::bfloat16, DType::float64}) {
    for (double softcap : {0.0, 30.0}) {
      Batch batch = random_batch(dtype, 3, 3000, 1);
      batch.options.softcap = softcap;
      batch.dlogps = {1, -0.5, 0};
      batch.dentropies = {0, 0.25, -1};
      const Doubles small = batch.run().dlogits;
      const double factor = dtype == DType::float64 ? 0x1p1020 : 0x1p125;
      for (Doubles* upstream : {&batch.dlogps, &batch.dentropies}) {
        for (double& each : *upstream) each *= factor;
      }
      const Doubles large = batch.run().dlogits;
      for (size_t i = 0; i < small.size(); ++i) {
        ASSERT_EQ(large[i], small[i] * factor) << name(dtype, 3000) << " " << i;
      }
    }
  }
}

// p = 0 exactly: no upstream gradient makes anything of it. A row that is NaN stays so everywhere.
TEST(Rows, AbsentColumnsHaveNoGradientUnderAnInfiniteOne) {
  for (DType dtype : kAllTypes) {
    for (double softcap : {0.0, 30.0}) {
      for (int kind = 0; kind < 3; ++kind) {
        Batch batch = random_batch(dtype, 3, 3000, 1);
        batch.options.softcap = softcap;
        batch.dlogps.assign(3, kind == 1 ? 1.0 : infinity);
        batch.dentropies.assign(3, kind == 0 ? 0.0 : -infinity);
        for (size_t v = 1; v < 9000; v += 7) batch.logits[v] = -infinity;
        batch.logits[8999] = kNan;
        const Doubles got = batch.run().dlogits;
        for (size_t i = 0; i < 6000; ++i) {
          if (batch.logits[i] == -infinity) {
            ASSERT_EQ(got[i], 0) << name(dtype, 3000) << " " << i;
          }
        }
        EXPECT_FALSE(std::isfinite(got[0]));
        for (size_t i = 6000; i < 9000; ++i) {
          const auto target = static_cast<size_t>(batch.targets[2]) + 6000;
          ASSERT_TRUE(std::isnan(got[i]) || i == target) << i;
        }
      }
    }
  }
}

TEST(Rows, ShuffledExtremesAreTheSameRow) {
  std::mt19937 generator(4);
  for (DType dtype : kAllTypes) {
    for (Doubles row : extreme_rows(dtype)) {
      if (row.size() > 1000) row.front() = 0;  // alone at first, in some other place afterwards
      const auto run = [&] {
        const auto target = std::find(row.begin(), row.end(), row[40]) - row.begin();
        Batch batch = {.dtype = dtype,
                       .vocabulary = static_cast<int64_t>(row.size()),
                       .logits = row,
                       .targets = {target}};
        return batch.run();
      };
      const double kept = row[40];
      const Result want = run();
      for (int shuffle = 0; shuffle < 5; ++shuffle) {
        std::shuffle(row.begin(), row.end(), generator);
        std::iter_swap(row.begin() + 40, std::find(row.begin(), row.end(), kept));
        const Result got = run();
        if (std::isinf(want.logps[0])) {
          ASSERT_EQ(got.logps[0], want.logps[0]);
        } else {
          ASSERT_NEAR(got.logps[0], want.logps[0], 1e-6 * (1 + std::abs(want.logps[0])));
        }
        ASSERT_NEAR(got.entropies[0], want.entropies[0], 1e-5);
      }
    }
  }
}

}  // namespace
}  // namespace tether
