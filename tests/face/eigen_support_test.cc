#include "face/eigen_support.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "tests/error_message.h"

namespace tether {
namespace {

using Eigen::ArrayXd;
using Eigen::ArrayXXd;
using Ids = Eigen::Array<int64_t, Eigen::Dynamic, Eigen::Dynamic>;

constexpr double kNan = std::numeric_limits<double>::quiet_NaN();

// Four rows of seven ids: three kept ones, two with the target added, none (all), an ignored row.
const Ids kIds{{1, 4, 6}, {5, -1, 0}, {-1, -1, -1}, {2, 3, -1}};
const eigen::Targets kTargets{{4, 3, 2, -100}};
const std::vector<std::vector<int64_t>> kSets = {{1, 4, 6}, {0, 3, 5}, {0, 1, 2, 3, 4, 5, 6}, {}};

ArrayXXd logits_of(unsigned seed) {
  std::srand(seed);
  return 3 * ArrayXXd::Random(4, 7);
}

// NaN beside the sets.
ArrayXXd poisoned(const ArrayXXd& logits) {
  ArrayXXd out = ArrayXXd::Constant(4, 7, kNan);
  for (size_t row = 0; row < kSets.size(); ++row) {
    for (const int64_t id : kSets[row]) out(int64_t(row), id) = logits(int64_t(row), id);
  }
  return out;
}

ArrayXd log_softmax(const ArrayXXd& logits, size_t row, double temperature) {
  ArrayXd x(std::ssize(kSets[row]));
  for (int64_t i = 0; i < x.size(); ++i) x(i) = logits(int64_t(row), kSets[row][size_t(i)]);
  x /= temperature;
  return x - std::log(x.exp().sum());
}

const RowOptions kOptions{.temperature = 0.7};

TEST(EigenSupport, LogpsAndEntropiesAreThoseOfTheKeptLogits) {
  const ArrayXXd logits = logits_of(1), x = poisoned(logits);
  const auto out = eigen::token_logps(x, kTargets, {.ids = kIds}, kOptions);
  for (const size_t row : {0U, 1U, 2U}) {
    const ArrayXd log_p = log_softmax(logits, row, 0.7);
    const auto place = std::ranges::find(kSets[row], kTargets(int64_t(row))) - kSets[row].begin();
    EXPECT_NEAR(out.logps(int64_t(row)), log_p(place), 1e-14);
    EXPECT_NEAR(out.entropies(int64_t(row)), -(log_p.exp() * log_p).sum(), 1e-14);
  }
  EXPECT_EQ(out.logps(3), 0);
  EXPECT_EQ(out.count_added, 1);
  EXPECT_TRUE((out.added == Eigen::Array<bool, 4, 1>(false, true, false, false)).all());
}

TEST(EigenSupport, GradientsOfLogpsAndEntropiesAreTheDerivatives) {
  const ArrayXXd logits = logits_of(2);
  const eigen::KeptIds kept{.ids = kIds};
  const ArrayXd dlogps{{0.5, -2, 3, 7}}, dentropies{{1, 0.25, -1, 7}};
  const auto loss = [&](const ArrayXXd& x) {
    const auto out = eigen::token_logps(x, kTargets, kept, kOptions);
    return (out.logps * dlogps + out.entropies * dentropies).sum();
  };
  const auto out = eigen::token_logps(logits, kTargets, kept, kOptions);
  const ArrayXXd got = eigen::token_logps_gradient(poisoned(logits), kTargets, kept, out, dlogps,
                                                   dentropies, kOptions);
  const double step = 1e-5;
  for (int i = 0; i < 4; ++i) {
    for (int v = 0; v < 7; ++v) {
      ArrayXXd up = logits, down = logits;
      up(i, v) += step;
      down(i, v) -= step;
      EXPECT_NEAR(got(i, v), (loss(up) - loss(down)) / (2 * step), 1e-8) << i << " " << v;
    }
  }
  EXPECT_EQ(got(0, 0), 0);
  EXPECT_TRUE((got.row(3) == 0).all());
}

TEST(EigenSupport, StorageOrderFloatsAndOffsetsChangeNothing) {
  const ArrayXXd logits = logits_of(3).cast<float>().cast<double>();
  const auto want = eigen::token_logps(logits, kTargets, {.ids = kIds});
  const Eigen::Array<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor> narrow =
      logits.cast<float>();
  const Eigen::Array<int, Eigen::Dynamic, 1> flat{{6, 1, 4, 0, 5, 3, 2}};
  const eigen::KeptIds packed{.ids = flat, .offsets = eigen::Targets{{0, 3, 5, 5, 7}}};
  const auto got = eigen::token_logps(narrow, kTargets, packed);
  EXPECT_TRUE(got.logps.isApprox(want.logps, 1e-6));
  const ArrayXd one = ArrayXd::Ones(4);
  const ArrayXXd dlogits = eigen::token_logps_gradient(narrow, kTargets, packed, got, one);
  EXPECT_TRUE(dlogits.isApprox(
      eigen::token_logps_gradient(logits, kTargets, {.ids = kIds}, want, one), 1e-6));
}

TEST(EigenSupport, DivergencesAreThoseOfTheKeptLogits) {
  const ArrayXXd q = logits_of(4), p = logits_of(5), x = poisoned(q), y = poisoned(p);
  const auto out = eigen::categorical_kl(x, y, {.ids = kIds}, kTargets, {.temperature = 0.7});
  for (const size_t row : {0U, 1U, 2U}) {
    const ArrayXd log_q = log_softmax(q, row, 0.7), log_p = log_softmax(p, row, 0.7);
    EXPECT_NEAR(out.kl(int64_t(row)), (log_q.exp() * (log_q - log_p)).sum(), 1e-13);
    EXPECT_NEAR(out.reverse_kl(int64_t(row)), (log_p.exp() * (log_p - log_q)).sum(), 1e-13);
    EXPECT_NEAR(out.entropies(int64_t(row)), -(log_q.exp() * log_q).sum(), 1e-13);
  }
  EXPECT_EQ(out.kl(3), 0);
}

TEST(EigenSupport, GradientsOfDivergencesAreTheDerivatives) {
  const ArrayXXd q = logits_of(6), p = logits_of(7);
  const eigen::KeptIds kept{.ids = kIds};
  const eigen::SupportKlUpstream upstream{ArrayXd{{1, -2, 0.5, 7}}, {}, ArrayXd{{0.25, 1, -1, 7}}};
  const auto loss = [&](const ArrayXXd& x, const ArrayXXd& y) {
    const auto out = eigen::categorical_kl(x, y, kept, kTargets);
    return (out.kl * upstream.kl + out.entropies * upstream.entropies).sum();
  };
  const auto out = eigen::categorical_kl(q, p, kept, kTargets);
  const auto got = eigen::categorical_kl_gradient(q, p, kept, out, upstream, kTargets);
  const double step = 1e-5;
  for (int i = 0; i < 4; ++i) {
    for (int v = 0; v < 7; ++v) {
      ArrayXXd move = ArrayXXd::Zero(4, 7);
      move(i, v) = step;
      EXPECT_NEAR(got.q(i, v), (loss(q + move, p) - loss(q - move, p)) / (2 * step), 1e-8);
      EXPECT_NEAR(got.p(i, v), (loss(q, p + move) - loss(q, p - move)) / (2 * step), 1e-8);
    }
  }
}

TEST(EigenSupport, ShapesAreChecked) {
  const ArrayXXd x = logits_of(8), wide = ArrayXXd::Zero(4, 8);
  const eigen::Targets three{{1, 2, 3}};
  EXPECT_EQ(message([&] { eigen::token_logps(x, three, {.ids = kIds}); }),
            "token_logps: targets must be [4], got [3]");
  EXPECT_EQ(message([&] { eigen::token_logps(x, kTargets, {kIds, three}); }),
            "token_logps: offsets must be [5], got [3]");
  EXPECT_EQ(message([&] { eigen::token_logps(x, kTargets, {kIds, eigen::Targets::Zero(5)}); }),
            "token_logps: ids must be [M, 1] with offsets, got [4, 3]");
  const Ids flat = kIds.col(0);
  const eigen::KeptIds beyond{flat, eigen::Targets{{0, 3, 5, 5, 8}}};
  EXPECT_EQ(message([&] { eigen::categorical_kl(x, x, beyond); }),
            "categorical_kl: offsets must run from 0 to 4, the size of ids, got 0 to 8");
  EXPECT_EQ(message([&] { eigen::categorical_kl(x, x, {.ids = kIds}, three); }),
            "categorical_kl: targets must be [4], got [3]");
  const auto out = eigen::token_logps(x, kTargets, {.ids = kIds});
  EXPECT_EQ(message([&] {
              eigen::token_logps_gradient(x, kTargets, {.ids = kIds}, out, ArrayXd::Zero(3));
            }),
            "token_logps_gradient: dlogps must be [4], got [3]");
  EXPECT_EQ(message([&] {
              const Ids high = kIds + 3;
              eigen::token_logps(x, kTargets, {.ids = high});
            }),
            "token_logps: ids must be in [0, 7) or -1 for none, got 7 at [0, 1]");
  EXPECT_EQ(message([&] { eigen::categorical_kl(x, wide, {.ids = kIds}); }),
            "categorical_kl: p must be [4, 7] of the type of q, got [4, 8]");
}

}  // namespace
}  // namespace tether
