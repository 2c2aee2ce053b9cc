#include "estimators/kl/catalogue.h"

#include <gtest/gtest.h>

#include <cmath>
#include <string>

namespace tether {
namespace {

// Values, slopes by log sampled and scores of both kinds of d, by the formulas in forms.h.
struct Hand {
  const char* name;
  double d, value, slope, score;
};
const Hand kByHand[] = {
    {"k1", 0.5, -0.5, 1, 0.5},
    {"k1", -2, 2, 1, 3},
    {"k2", 0.5, 0.125, -0.5, -0.375},
    {"k2", -2, 2, 2, 4},
    {"k3", 0.5, std::exp(0.5) - 1.5, 1 - std::exp(0.5), -0.5},
    {"k3", -2, std::exp(-2) + 1, 1 - std::exp(-2), 2},
    {"low_var_kl", 0.5, std::exp(0.5) - 1.5, 1 - std::exp(0.5), -0.5},
    {"low_var_kl", -2, std::exp(-2) + 1, 1 - std::exp(-2), 2},
    {"low_var_kl", 3, 10, 0, 10},
    {"low_var_kl", 2.5, std::exp(2.5) - 3.5, 1 - std::exp(2.5), -2.5},
    {"low_var_kl", -12, 10, 0, 10},
    {"low_var_kl", -10.5, std::exp(-10.5) + 9.5, 1 - std::exp(-10.5), 10.5},
    {"abs", 0.5, 0.5, -1, -0.5},
    {"abs", -2, 2, 1, 3},
    {"abs", 0, 0, 0, 0},
};

template <class T>
void expect_by_hand(double tolerance) {
  for_each_kl_form([&](const auto& row) {
    SCOPED_TRACE(row.name);
    const KlForm form = row.defaults;
    int cases = 0;
    for (const Hand& hand : kByHand) {
      if (hand.name != row.name) continue;
      ++cases;
      T sampled[16], other[16], value[16], alone[16], slope[16], score[16];
      for (int i = 0; i < 16; ++i) {
        sampled[i] = T(-1 - 0.125 * i);
        other[i] = T(sampled[i] + hand.d);
      }
      const KlColumns<T> in{sampled, other, 16};
      form.value(in, alone);
      form.value_and_slope(in, value, slope);
      form.score(in, score);
      for (int i = 0; i < 16; ++i) {
        EXPECT_NEAR(value[i], hand.value, tolerance);
        EXPECT_EQ(alone[i], value[i]);
        EXPECT_NEAR(slope[i], hand.slope, tolerance);
        EXPECT_NEAR(score[i], hand.score, tolerance);
      }
    }
    EXPECT_GE(cases, 2) << "a form without numbers by hand";
  });
}
TEST(KlCatalogue, LoopsHaveTheNumbersByHandInFloat) { expect_by_hand<float>(1e-6); }
TEST(KlCatalogue, LoopsHaveTheNumbersByHandInDouble) { expect_by_hand<double>(1e-15); }

TEST(KlCatalogue, ScoresAreValuePlusSlope) {
  for_each_kl_form([](const auto& row) {
    for (const double d : {-3.0, -0.5, 0.0, 0.5, 3.0}) {
      const Dual<double> by_logp = row.defaults(Dual<double>{d, -1});
      EXPECT_NEAR(kl_score(row.defaults, Constant<double>{d}).value, by_logp.value + by_logp.grad,
                  1e-15)
          << row.name << " " << d;
    }
  });
}

// By enumeration over three outcomes: mean and gradients in the logits of q, which are
// q_i (c_i - mean c) of a coefficient c of grad log q.
class Enumerated {
 public:
  // Whether c follows the divergence, an estimator of which has the value `kl`.
  template <class Coefficient>
  void expect_follows(KlDirection direction, Coefficient coefficient, const std::string& what) {
    double c[3], mean = 0, to_reverse = 0, to_forward = 0;
    for (int i = 0; i < 3; ++i) mean += q[i] * (c[i] = coefficient(std::log(p[i] / q[i])));
    for (int i = 0; i < 3; ++i) {
      const double gradient = q[i] * (c[i] - mean);
      to_reverse = std::max(to_reverse, std::abs(gradient - q[i] * (std::log(q[i] / p[i]) - kl())));
      to_forward = std::max(to_forward, std::abs(gradient - (q[i] - p[i])));
    }
    EXPECT_EQ(to_reverse < 1e-14, direction == KlDirection::reverse) << what << " " << to_reverse;
    EXPECT_EQ(to_forward < 1e-14, direction == KlDirection::forward) << what << " " << to_forward;
  }
  template <class Value>
  void expect_mean(KlDirection direction, Value value, const std::string& what) {
    double mean = 0;
    for (int i = 0; i < 3; ++i) mean += q[i] * value(std::log(p[i] / q[i]));
    EXPECT_EQ(std::abs(mean - kl()) < 1e-14, direction == KlDirection::reverse) << what;
  }

 private:
  double kl() const {
    double sum = 0;
    for (int i = 0; i < 3; ++i) sum += q[i] * std::log(q[i] / p[i]);
    return sum;
  }
  const double q[3] = {0.5, 0.3, 0.2}, p[3] = {0.25, 0.3, 0.45};
};

TEST(KlCatalogue, LabelsAreWhatMeanSlopeAndScoreFollow) {
  for_each_kl_form([](const auto& row) {
    const std::string name(row.name);
    const KlLabels labels = KlForm(row.defaults).labels();
    const auto at = [&](double d) { return row.defaults(Dual<double>{d, -1}); };
    Enumerated three;
    three.expect_mean(labels.value, [&](double d) { return at(d).value; }, name + " mean");
    three.expect_follows(labels.slope, [&](double d) { return at(d).grad; }, name + " slope");
    three.expect_follows(
        labels.score, [&](double d) { return kl_score(row.defaults, Constant<double>{d}).value; },
        name + " score");
  });
}

TEST(KlCatalogue, NamesAndFormsAreEachOthers) {
  for (size_t i = 0; i < kKlFormNames.size(); ++i) {
    KlForm form = K3{};
    choose(form, i);
    EXPECT_EQ(chosen(form), i) << kKlFormNames[i];
  }
}

// A user's own.
struct Scaled {
  double scale = 1;

  static constexpr auto fields() { return std::tuple{field("scale", &Scaled::scale, {0, 10})}; }
  template <class Number>
  TETHER_FORMULA Number operator()(const Number& d) const {
    return d * d * scale;
  }
};
struct Hidden : Scaled {
  double more = 0;
};

TEST(KlForm, IsTheSameByTypeAndOptions) {
  EXPECT_TRUE(KlForm(K3{}) == KlForm(K3{}));
  EXPECT_FALSE(KlForm(K3{}) == KlForm(K2{}));
  EXPECT_TRUE(KlForm(Scaled{2}) == KlForm(Scaled{2}));
  EXPECT_FALSE(KlForm(Scaled{2}) == KlForm(Scaled{3}));
  EXPECT_FALSE(KlForm(Hidden{}) == KlForm(Hidden{})) << "a member that no list names";
}

TEST(KlForm, OfAUserHasNoLabelsUnlessStatedAndTheSumAsItsScore) {
  const KlForm form = Scaled{2};
  EXPECT_EQ(form.labels().slope, KlDirection::none);
  EXPECT_EQ(form.labels().score, KlDirection::none);
  EXPECT_EQ(chosen(form), kKlFormNames.size());
  double sampled[16] = {}, other[16], score[16];
  for (double& each : other) each = 0.5;
  form.score({sampled, other, 16}, score);
  EXPECT_EQ(score[7], 2 * 0.25 - 2 * 2 * 0.5);
}

}  // namespace
}  // namespace tether
