#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "estimators/advantage/catalogue.h"
#include "estimators/advantage/row_scan.h"

// Rows for recursions, and every recursion of the catalogue.

namespace tether::recursion_test {

using Doubles = std::vector<double>;

inline constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

struct RowResults {
  Doubles advantages, returns;

  bool operator==(const RowResults&) const = default;
};

// Rows of two blocks and a bit, everything given; numbers at masked slots too.
struct Rows {
  int64_t rows, columns;
  Doubles rewards, values, mask, bootstrap, done, truncated, truncation_values, lambdas, log_ratios;

  explicit Rows(unsigned seed = 3, int64_t row_count = 5, int64_t column_count = 600)
      : rows(row_count), columns(column_count) {
    std::mt19937 random(seed);
    std::normal_distribution<double> normal;
    const auto filled = [&](int64_t size, auto draw) {
      Doubles out(static_cast<size_t>(size));
      for (double& each : out) each = draw();
      return out;
    };
    const auto numbers = [&] { return filled(rows * columns, [&] { return normal(random); }); };
    const auto one_in = [&](unsigned n) {
      return filled(rows * columns, [&, n] { return random() % n == 0; });
    };
    rewards = numbers();
    values = numbers();
    truncation_values = numbers();
    log_ratios = numbers();
    mask = filled(rows * columns, [&] { return random() % 4 != 0; });
    done = one_in(16);
    truncated = one_in(16);
    bootstrap = filled(rows, [&] { return normal(random); });
    lambdas = filled(rows * columns, [&] { return double(random() % 100) / 100; });
    for (int64_t row = 0; row < rows; ++row) {  // padding, and a row of nothing else
      const int64_t length = row == 2 ? 0 : std::max<int64_t>(0, columns - 70 * row);
      std::fill_n(mask.begin() + row * columns + length, columns - length, 0.0);
    }
  }

  ConstArray tokens(const Doubles& array) const {
    return {array.data(), DType::float64, columns, 1};
  }
  AdvantageArrays arrays() const {
    return {.layout = {.rows = rows, .columns = columns},
            .rewards = tokens(rewards),
            .values = tokens(values),
            .response_mask = tokens(mask),
            .bootstrap = {.data = bootstrap.data(),
                          .dtype = DType::float64,
                          .row_stride = 1,
                          .per_row = true},
            .done = tokens(done),
            .truncated = tokens(truncated),
            .truncation_values = tokens(truncation_values),
            .lambdas = tokens(lambdas),
            .log_ratios = tokens(log_ratios)};
  }
  RowResults run(const Recursion& recursion, const Executor& executor = {}) const {
    return run(recursion, arrays(), executor);
  }
  RowResults run(const Recursion& recursion, const AdvantageArrays& batch,
                 const Executor& executor = {}) const {
    RowResults out{Doubles(rewards.size(), 7), Doubles(rewards.size(), 7)};
    scan_rows("advantage", batch, recursion, {out.advantages.data(), DType::float64, columns, 1},
              {out.returns.data(), DType::float64, columns, 1}, executor);
    return out;
  }
  std::vector<Doubles*> of_tokens() {
    return {&rewards, &values, &mask, &done, &truncated, &truncation_values, &lambdas, &log_ratios};
  }
};

// check(recursion) for every row of the catalogue, with discounts and both ways over a gap.
template <class Check>
void for_each_case(Check check) {
  for_each_recursion([&](const auto& row) {
    for (const MaskGap gap : {MaskGap::carry, MaskGap::decay}) {
      auto estimator = row.defaults;
      estimator.gamma = 0.9;
      estimator.gap = gap;
      SCOPED_TRACE(std::string(row.name) + (gap == MaskGap::carry ? " carry" : " decay"));
      check(Recursion(estimator));
    }
  });
}

// No result of run(recursion, rows, batch) is NaN, of any finite numbers and any options.
template <class Run>
void expect_no_nan(int trials, Run run) {
  std::mt19937 random(9);
  for_each_case([&](Recursion recursion) {
    for (int trial = 0; trial < trials; ++trial) {
      Rows rows(static_cast<unsigned>(trial));
      const double sizes[] = {0, 1, 1e150, 1.7e308}, ratios[] = {0, 1, 700, 1e300};
      for (Doubles* each : {&rows.rewards, &rows.values, &rows.truncation_values}) {
        for (double& x : *each) x = std::copysign(sizes[random() % 4], x);
      }
      for (double& x : rows.log_ratios) x = std::copysign(ratios[random() % 4], x);
      for (double& x : rows.lambdas) x = random() % 2;
      recursion.for_each_field([&](std::string_view, double& option, const Range& range) {
        option = random() % 2 ? range.low : range.high;
      });
      AdvantageArrays batch = rows.arrays();
      if (trial % 2 == 0) batch.done = batch.truncated = {};  // no end within a row
      const RowResults out = run(rows, recursion, batch);
      for (size_t i = 0; i < out.advantages.size(); ++i) {
        ASSERT_FALSE(std::isnan(out.advantages[i])) << trial << " " << i;
        ASSERT_FALSE(std::isnan(out.returns[i])) << trial << " " << i;
      }
    }
  });
}

}  // namespace tether::recursion_test
