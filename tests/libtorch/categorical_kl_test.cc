#include "libtorch/categorical_kl.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <gtest/gtest.h>
#include <torch/csrc/autograd/autograd.h>

#include <limits>
#include <string>
#include <utility>
#include <vector>

#include "tests/libtorch/kl_results.h"

namespace tether {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr double kNan = std::numeric_limits<double>::quiet_NaN();

using Call = CategoricalKl (*)(const at::Tensor&, const at::Tensor&, const CategoricalKlOptions&);

at::Tensor leaf(const at::Tensor& tensor) { return tensor.detach().requires_grad_(); }

CategoricalKl by_log_softmax(const at::Tensor& q_logits, const at::Tensor& p_logits,
                             const CategoricalKlOptions& options) {
  const at::Tensor log_q = at::log_softmax(q_logits / options.temperature, -1);
  const at::Tensor log_p = at::log_softmax(p_logits / options.temperature, -1);
  return {(log_q.exp() * (log_q - log_p)).sum(-1), (log_p.exp() * (log_p - log_q)).sum(-1),
          -(log_q.exp() * log_q).sum(-1)};
}

std::vector<at::Tensor> results(Call call, const at::Tensor& q_logits, const at::Tensor& p_logits,
                                const CategoricalKlOptions& options) {
  return tether::results(
      [&](const at::Tensor& q, const at::Tensor& p) { return call(q, p, options); }, q_logits,
      p_logits);
}

TEST(CategoricalKl, MatchesLogSoftmaxInDouble) {
  at::manual_seed(1);
  for (at::ScalarType type : {at::kFloat, at::kDouble, at::kBFloat16, at::kHalf}) {
    for (int64_t vocabulary : {1, 3, 33, 2049, 9000}) {
      const at::Tensor whole = (at::randn({2, 4, vocabulary}, at::kDouble) * 3).to(type);
      const at::Tensor q = whole.slice(1, 0, -1);
      const at::Tensor p = (q.to(at::kDouble) + at::randn(q.sizes(), at::kDouble)).to(type);
      const CategoricalKlOptions options{.temperature = 0.8};
      const auto want = results(by_log_softmax, q.to(at::kDouble), p.to(at::kDouble), options);
      for (Call call : {categorical_kl, detail::categorical_kl_any_device}) {
        auto got = results(call, q, p, options);
        EXPECT_EQ(got[0].scalar_type(), type == at::kDouble ? at::kDouble : at::kFloat);
        EXPECT_EQ(got[4].scalar_type(), type);
        const double tolerance = type == at::kDouble ? 1e-13 : 2e-5;
        const std::string what =
            std::string(c10::toString(type)) + " " + std::to_string(vocabulary);
        expect_same({got[0], got[1], got[2]}, {want[0], want[1], want[2]}, tolerance, what);
        const double rounding = type == at::kBFloat16 ? 0x1p-8 : type == at::kHalf ? 0x1p-10 : 0;
        expect_same({got[3], got[4]}, {want[3], want[4]}, tolerance + rounding, what);
      }
    }
  }
}

TEST(CategoricalKl, MaskedPositionsMayHoldAnything) {
  at::manual_seed(2);
  const at::Tensor q = at::randn({3, 4, 50}), p = at::randn({3, 4, 50});
  const at::Tensor mask = at::rand({3, 4}) > 0.4;
  const auto want = results(categorical_kl, q, p, {.mask = mask});
  EXPECT_EQ(want[0].masked_select(mask.logical_not()).abs().max().item<double>(), 0);
  const at::Tensor poison = mask.logical_not().unsqueeze(-1);
  const at::Tensor bad_q = q.masked_fill(poison, kNan), bad_p = p.masked_fill(poison, kInfinity);
  for (Call call : {categorical_kl, detail::categorical_kl_any_device}) {
    expect_same(results(call, bad_q, bad_p, {.mask = mask}), want, 1e-5, "poison");
  }
}

TEST(CategoricalKl, GradientOnlyWhereAsked) {
  const at::Tensor q = leaf(at::randn({3, 50})), p = at::randn({3, 50});
  const at::Tensor want = results(categorical_kl, q.detach(), p, {})[3];
  const CategoricalKl out = categorical_kl(q, p);
  const at::Tensor a = at::linspace(-0.5, 2, 3, at::kDouble);
  (out.kl * a + out.reverse_kl * (0.3 - a) + out.entropies * (1.7 - a)).sum().backward();
  EXPECT_TRUE(at::allclose(q.grad(), want, 1e-5, 1e-7));
  EXPECT_FALSE(categorical_kl(p, p).kl.requires_grad());
}

// A column that one row has not, beside a probability below 2^-100; logits of any size.
TEST(CategoricalKl, EveryDevicePathHasTheEdgesOfTheKernel) {
  const auto row = [](std::vector<double> logits) { return at::tensor(logits, at::kDouble); };
  const std::vector<std::pair<at::Tensor, at::Tensor>> pairs = {
      {row({0, 1, -80}), row({1, 0, -kInfinity})},
      {row({0, 1, -60}), row({1, 0, -kInfinity})},
      {row({1e200, -1e200, 0}), row({-1e200, 1e200, 1})},
      {row({1e200, 0.5, 0}), row({1e200, 0, 1})},
      {row({0, 1, 2}), row({1, -kInfinity, 0})},  // an infinite divergence, either way
      {row({1, -kInfinity, 0}), row({0, 1, 2})},
      {row({0, kInfinity, 2}), row({1, 0, -kInfinity})}};
  for (const double temperature : {1e-6, 1.0, 1e6}) {
    for (const auto& [q, p] : pairs) {
      const CategoricalKlOptions options{.temperature = temperature};
      const auto want = results(categorical_kl, q.unsqueeze(0), p.unsqueeze(0), options);
      const auto got =
          results(detail::categorical_kl_any_device, q.unsqueeze(0), p.unsqueeze(0), options);
      for (size_t i = 0; i < want.size(); ++i) {
        EXPECT_TRUE(at::allclose(got[i], want[i], 1e-12, 1e-13, /*equal_nan=*/true))
            << temperature << "\n"
            << q << "\nresult " << i << "\n"
            << got[i] << "\n"
            << want[i];
      }
    }
  }
}

// What is exactly 0, as of columns that are not there, stays 0 under an infinite gradient; a
// divergence that is infinite has none under one of 0.
TEST(CategoricalKl, ZerosStayZerosOnEveryDevice) {
  at::Tensor q = at::randn({2, 30}, at::kDouble), p = at::randn({2, 30}, at::kDouble);
  q.select(1, 4).fill_(-kInfinity);
  p.select(1, 4).fill_(-kInfinity);
  p[1][5] = -kInfinity;  // KL(q || p) is infinite
  const at::Tensor upstream = at::tensor({kInfinity, 0.0}, at::kDouble);
  for (Call call : {categorical_kl, detail::categorical_kl_any_device}) {
    const at::Tensor x = leaf(q), y = leaf(p);
    const auto out = torch::autograd::grad({call(x, y, {}).kl}, {x, y}, {upstream});
    for (const at::Tensor& each : out) {
      EXPECT_EQ(each[0].isinf().sum().item<int64_t>(), 29);
      EXPECT_EQ(each[0][4].item<double>(), 0);
      EXPECT_EQ(each[1].abs().max().item<double>(), 0);
    }
  }
}

TEST(CategoricalKl, ThreadsChangeNoBit) {
  const at::Tensor q = at::randn({64, 3000}), p = at::randn({64, 3000});
  const int threads = at::get_num_threads();
  at::set_num_threads(1);
  const auto want = results(categorical_kl, q, p, {});
  at::set_num_threads(3);
  const auto got = results(categorical_kl, q, p, {});
  for (size_t i = 0; i < want.size(); ++i) EXPECT_TRUE(at::equal(got[i], want[i]));
  at::set_num_threads(threads);
}

TEST(CategoricalKl, SecondBackwardIsRefused) {
  const at::Tensor q = leaf(at::randn({3, 20}, at::kDouble)), p = at::randn({3, 20}, at::kDouble);
  const at::Tensor elsewhere = torch::autograd::grad(
      {detail::categorical_kl_any_device(q, p, {}).kl.square().sum()}, {q}, {}, true, true)[0];
  EXPECT_THROW(torch::autograd::grad({elsewhere.sum()}, {q}), c10::Error);
  const at::Tensor first = torch::autograd::grad({categorical_kl(q, p).kl.square().sum()}, {q}, {},
                                                 {}, /*create_graph=*/true)[0];
  EXPECT_THROW(first.square().sum().backward(), c10::NotImplementedError);
}

template <class Exception>
std::string refusal(const at::Tensor& q, const at::Tensor& p,
                    const CategoricalKlOptions& options = {}) {
  try {
    categorical_kl(q, p, options);
  } catch (const Exception& error) {
    return error.what_without_backtrace();
  }
  return "no error";
}

TEST(CategoricalKl, BadInputIsRefused) {
  const at::Tensor q = at::zeros({4, 8}), p = at::zeros({4, 8});
  EXPECT_EQ(refusal<c10::ValueError>(at::Tensor(), p),
            "categorical_kl: q_logits must be given, got none");
  EXPECT_EQ(refusal<c10::ValueError>(at::zeros({4, 0}), p),
            "categorical_kl: q_logits must be [..., V] with V at least 1, got [4, 0]");
  EXPECT_EQ(refusal<c10::TypeError>(q, p.to(at::kDouble)),
            "categorical_kl: p_logits must be float32 like q_logits, got float64");
  EXPECT_EQ(refusal<c10::ValueError>(q, at::zeros({4, 7})),
            "categorical_kl: p_logits must be [4, 8] like q_logits, got [4, 7]");
  EXPECT_EQ(refusal<c10::ValueError>(q, p, {.temperature = 0}),
            "categorical_kl: temperature must be in [1e-06, 1e+06], got 0");
  EXPECT_EQ(refusal<c10::TypeError>(q, p, {.mask = at::ones({4})}),
            "categorical_kl: mask must be bool, got float32");
  EXPECT_EQ(refusal<c10::ValueError>(q, p, {.mask = at::ones({3}, at::kBool)}),
            "categorical_kl: mask must be [4] like q_logits [4, 8], got [3]");
}

}  // namespace
}  // namespace tether
