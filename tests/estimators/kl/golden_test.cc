#include <gtest/gtest.h>

#include <cmath>
#include <fstream>
#include <iostream>
#include <nlohmann/json.hpp>
#include <set>
#include <string>
#include <vector>

#include "estimators/kl/exact.h"
#include "estimators/kl/forms.h"
#include "logits/top_k_kl.h"
#include "rl/kl_penalty.h"

// kl_golden.json, from 100-digit arithmetic: what the library has is compared, what it does not
// have yet is counted.

namespace tether {
namespace {

using Json = nlohmann::json;

// The numbers and lists below a node, by path; entries of lists share one.
void leaves(const Json& node, const std::string& path, std::set<std::string>& out) {
  if (node.is_object()) {
    for (const auto& [key, child] : node.items()) leaves(child, path + "/" + key, out);
  } else if (node.is_array() && !node.empty() && node[0].is_object()) {
    for (const Json& child : node) leaves(child, path, out);
  } else {
    out.insert(path);
  }
}

class Golden {
 public:
  Golden() : root_(Json::parse(std::ifstream(TETHER_TESTS_DIR "/golden/kl_golden.json"))) {
    leaves(root_, "", unvisited_);
  }
  const Json& operator[](const char* key) const { return root_[key]; }
  void visit(const std::string& path) { visited_ += unvisited_.erase(path); }
  // Everything below: inputs, notes.
  void visit_below(const std::string& path) {
    visited_ += std::erase_if(unvisited_, [&](const auto& each) { return each.starts_with(path); });
  }
  size_t unvisited() const { return unvisited_.size(); }
  size_t visited() const { return visited_; }

 private:
  Json root_;
  std::set<std::string> unvisited_;
  size_t visited_ = 0;
};

// Log-probabilities are rounded, which moves d by 2e-16 and a divergence of d^2 / 2 by d times
// that.
void expect_close(double value, double expected) {
  EXPECT_NEAR(value, expected, 1e-11 * expected + 4e-16 * std::sqrt(expected));
}

using Doubles = std::vector<double>;

void expect_near(const Doubles& values, const Doubles& expected, double tolerance) {
  ASSERT_EQ(values.size(), expected.size());
  for (size_t i = 0; i < values.size(); ++i) EXPECT_NEAR(values[i], expected[i], tolerance) << i;
}

// sum_x q_x c(d_x) (1[x = j] - q_j): the gradient in the logits of q of a loss whose derivative by
// log q(x) is c, over samples of q.
template <class Coefficient>
Doubles logit_gradient(const Doubles& log_q, const Doubles& log_p, Coefficient coefficient) {
  Doubles out(log_q.size());
  double mean = 0;
  for (size_t x = 0; x < out.size(); ++x) {
    out[x] = std::exp(log_q[x]) * coefficient(log_q[x], log_p[x]);
    mean += out[x];
  }
  for (size_t j = 0; j < out.size(); ++j) out[j] -= std::exp(log_q[j]) * mean;
  return out;
}

void check_categorical(Golden& golden) {
  for (const Json& each : golden["categorical"]) {
    const std::vector<double> q = each["logprob_q"], p = each["logprob_p"];
    const auto size = static_cast<int64_t>(q.size());
    Doubles forward(q.size()), reverse(q.size());
    const double kl_qp = categorical_kl(q.data(), p.data(), size, forward.data());
    const double kl_pq = categorical_kl(p.data(), q.data(), size, nullptr, reverse.data());
    expect_close(kl_qp, each["divergences"]["kl_qp"]);
    expect_close(kl_pq, each["divergences"]["kl_pq"]);
    const Json& gradients = each["grad_logits_q"];
    if (gradients.is_null()) continue;
    expect_near(forward, gradients["exact_kl_qp"], 1e-13);
    expect_near(reverse, gradients["exact_kl_pq"], 1e-13);
    // The table of rl/kl_penalty.h on-policy, where the ratio is 1 and its gradient is not 0.
    const auto penalty = [&](const auto& form, KlCorrection correction) {
      return logit_gradient(q, p, [&](double log_q, double log_p) {
        return kl_term(form, form, correction, Dual<double>{log_q, 1}, Dual<double>{0, 1},
                       Constant<double>{log_p}, weight_bounds(kWeightSaturation<double>, infinity))
            .grad;
      });
    };
    using C = KlCorrection;
    for (const C c : {C::none, C::detached_ratio}) {
      expect_near(penalty(K1{}, c), gradients["k1_as_loss"], 1e-13);
      expect_near(penalty(K2{}, c), gradients["k2_as_loss"], 1e-12);
      expect_near(penalty(K3{}, c), gradients["k3_as_loss"], 1e-12);
    }
    expect_near(penalty(K1{}, C::ratio), gradients["ratio_in_graph_times_k1"], 1e-12);
    expect_near(penalty(K2{}, C::ratio), gradients["ratio_in_graph_times_k2"], 1e-12);
    expect_near(penalty(K3{}, C::ratio), gradients["exact_kl_qp"], 1e-12);
  }
  for (const char* key :
       {"name", "vocab", "logits_q", "logits_p", "logprob_q", "logprob_p", "divergences/kl_qp",
        "divergences/kl_pq", "grad_logits_q/exact_kl_qp", "grad_logits_q/exact_kl_pq",
        "grad_logits_q/k1_as_loss", "grad_logits_q/k2_as_loss", "grad_logits_q/k3_as_loss",
        "grad_logits_q/ratio_in_graph_times_k1", "grad_logits_q/ratio_in_graph_times_k2"}) {
    golden.visit(std::string("/categorical/") + key);
  }
}

// By enumeration of the samples: mean, variance and mean gradient.
struct Enumerated {
  double mean = 0, variance = 0;
  Doubles gradient;
};

Enumerated enumerated_top_k(const Json& each, const Json& head, TailEstimate tail) {
  const Doubles log_q = each["logprob_q"], log_p = each["logprob_p"];
  const std::vector<int64_t> ids = head["indices"];
  Doubles p_logps;
  for (const int64_t id : ids) p_logps.push_back(log_p[size_t(id)]);
  const TopKKlOptions options{.tail = tail, .precision = 0x1p-52};
  Enumerated out{.gradient = Doubles(log_q.size())};
  double square = 0;
  for (size_t y = 0; y < log_q.size(); ++y) {
    const auto target = static_cast<int64_t>(y);
    const TopKHeads heads{
        .q = {log_q.data(), DType::float64, 1, static_cast<int64_t>(log_q.size())},
        .size = static_cast<int64_t>(ids.size()),
        .ids = ids.data(),
        .p_logps = p_logps.data(),
        .targets = &target,
        .p_target_logps = &log_p[y]};
    RowStatistics statistics;
    double kl = 0;
    top_k_kl(heads, options, &statistics, &kl);
    const double weight = std::exp(log_q[y]);
    out.mean += weight * kl;
    square += weight * kl * kl;
    Doubles dq(log_q.size());
    top_k_kl_gradients(heads, options, &statistics, &weight,
                       {dq.data(), DType::float64, 1, static_cast<int64_t>(dq.size())});
    for (size_t v = 0; v < dq.size(); ++v) out.gradient[v] += dq[v];
  }
  out.variance = square - out.mean * out.mean;
  return out;
}

void check_top_k(Golden& golden) {
  for (const Json& each : golden["categorical"]) {
    if (!each.contains("topk")) continue;
    for (const Json& head : each["topk"]) {
      const Enumerated bucket = enumerated_top_k(each, head, TailEstimate::bucket);
      EXPECT_NEAR(bucket.mean, head["tail_bucket"], 1e-14);
      for (const auto& [tail, key] : {std::pair{TailEstimate::k1, "bucket_plus_centred_tail_k1"},
                                      std::pair{TailEstimate::k3, "bucket_plus_within_tail_k3"}}) {
        const Enumerated got = enumerated_top_k(each, head, tail);
        EXPECT_NEAR(got.mean, head[key]["mean"], 1e-13) << each["name"] << key;
        EXPECT_NEAR(got.variance, head[key]["var"], 1e-12 * (1 + got.variance)) << each["name"];
        expect_near(got.gradient, each["grad_logits_q"]["exact_kl_qp"], 1e-12);
      }
    }
  }
  for (const char* key : {"k", "indices", "tail_bucket", "lower_bound"}) {
    golden.visit(std::string("/categorical/topk/") + key);
  }
  for (const char* tail : {"bucket_plus_centred_tail_k1", "bucket_plus_within_tail_k3"}) {
    for (const char* key : {"/mean", "/var"}) {
      golden.visit(std::string("/categorical/topk/") + tail + key);
    }
  }
}

void check_bernoulli(Golden& golden) {
  const auto logit = [](double p) { return std::log(p) - std::log1p(-p); };
  for (const Json& each : golden["bernoulli"]) {
    const Constant<double> q{logit(each["q1"])}, p{logit(each["p1"])};
    expect_close(bernoulli_kl(q, p).value, each["divergences"]["kl_qp"]);
    expect_close(bernoulli_kl(p, q).value, each["divergences"]["kl_pq"]);
  }
  for (const char* key : {"name", "q1", "p1", "d", "divergences/kl_qp", "divergences/kl_pq"}) {
    golden.visit(std::string("/bernoulli/") + key);
  }
}

void check_gaussian(Golden& golden) {
  for (const Json& each : golden["gaussian"]) {
    using D = Dual<double, 4>;
    const double sigma_q = each["sigma_q"], sigma_p = each["sigma_p"];
    const double numbers[] = {each["mu_q"], std::log(sigma_q), each["mu_p"], std::log(sigma_p)};
    D inputs[4];
    for (int i = 0; i < 4; ++i) {
      inputs[i].value = numbers[i];
      inputs[i].grad[i] = 1;
    }
    const D forward = gaussian_kl(inputs[0], inputs[1], inputs[2], inputs[3]);
    const D reverse = gaussian_kl(inputs[2], inputs[3], inputs[0], inputs[1]);
    EXPECT_NEAR(forward.value, each["kl_qp"], 1e-14 * (1 + std::abs(forward.value)));
    EXPECT_NEAR(reverse.value, each["kl_pq"], 1e-14 * (1 + std::abs(reverse.value)));
    const Json& gradients = each["grad_mu_logsigma"];
    for (int i = 0; i < 2; ++i) {
      EXPECT_NEAR(forward.grad[i], gradients["exact_kl_qp"][size_t(i)], 1e-12) << each["name"];
      EXPECT_NEAR(reverse.grad[i], gradients["exact_kl_pq"][size_t(i)], 1e-12) << each["name"];
    }
  }
  for (const char* key : {"name", "mu_q", "sigma_q", "mu_p", "sigma_p", "kl_qp", "kl_pq",
                          "grad_mu_logsigma/exact_kl_qp", "grad_mu_logsigma/exact_kl_pq"}) {
    golden.visit(std::string("/gaussian/") + key);
  }
}

// By enumeration of the outcomes: mean and variance of the one-sample estimators.
void check_estimators(Golden& golden, const char* family) {
  const auto enumerate = [](const std::vector<double>& q, const std::vector<double>& d,
                            auto estimator, const Json& expected) {
    double mean = 0, square = 0;
    for (size_t i = 0; i < q.size(); ++i) {
      const double k = estimator(Constant<double>{d[i]}).value;
      mean += q[i] * k;
      square += q[i] * k * k;
    }
    EXPECT_NEAR(mean, expected["mean"], 1e-10 * (1 + std::abs(mean)));
    EXPECT_NEAR(square - mean * mean, expected["var"], 1e-9 * (1 + square));
  };
  for (const Json& each : golden[family]) {
    std::vector<double> q, d;
    if (each.contains("q1")) {
      const double q1 = each["q1"];
      q = {1 - q1, q1};
      d = each["d"].get<std::vector<double>>();
    } else {
      const std::vector<double> log_q = each["logprob_q"], log_p = each["logprob_p"];
      for (size_t i = 0; i < log_q.size(); ++i) {
        q.push_back(std::exp(log_q[i]));
        d.push_back(log_p[i] - log_q[i]);
      }
    }
    const Json& estimators = each["estimators"];
    enumerate(q, d, [](auto x) { return k1(x); }, estimators["k1"]);
    enumerate(q, d, [](auto x) { return k2(x); }, estimators["k2"]);
    enumerate(q, d, [](auto x) { return k3(x); }, estimators["k3"]);
  }
  for (const char* k : {"k1", "k2", "k3"}) {
    for (const char* key : {"/mean", "/var"}) {
      golden.visit(std::string("/") + family + "/estimators/" + k + key);
    }
  }
}

// q = (1, e^-a), p = (e^-a, 1), both up to their sum: KL = a tanh(a / 2).
TEST(ExactKl, IsRightFarApart) {
  for (const double a : {0.5, 3.0, 40.0, 590.0, 620.0, 700.0}) {
    const double high = -std::log1p(std::exp(-a)), low = high - a;
    const double q[] = {high, low}, p[] = {low, high};
    EXPECT_NEAR(categorical_kl(q, p, 2), a * std::tanh(a / 2), 1e-15 * a) << a;
    const double kl = bernoulli_kl(Constant<double>{a}, Constant<double>{-a}).value;
    EXPECT_NEAR(kl, a * std::tanh(a / 2), 1e-15 * a) << a;
    const float narrow = bernoulli_kl(Constant<float>{float(a)}, Constant<float>{-float(a)}).value;
    EXPECT_NEAR(narrow, a * std::tanh(a / 2), 1e-6 * a) << a;
  }
}

TEST(KlGolden, WhatExistsIsRightAndTheRestIsCounted) {
  Golden golden;
  golden.visit_below("/conventions");
  golden.visit_below("/pointwise");  // kl_test.cc
  check_categorical(golden);
  check_top_k(golden);
  check_bernoulli(golden);
  check_gaussian(golden);
  check_estimators(golden, "bernoulli");
  check_estimators(golden, "categorical");
  std::cout << "kl_golden.json: " << golden.visited() << " keys visited, " << golden.unvisited()
            << " not yet\n";
  EXPECT_EQ(golden.unvisited(), 508u) << "this number only falls";
}

}  // namespace
}  // namespace tether
