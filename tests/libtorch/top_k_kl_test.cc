#include "libtorch/top_k_kl.h"

#include <ATen/ATen.h>
#include <c10/util/Exception.h>
#include <gtest/gtest.h>
#include <torch/csrc/autograd/autograd.h>

#include <array>
#include <limits>
#include <string>
#include <vector>

#include "libtorch/categorical_kl.h"

namespace tether {
namespace {

constexpr double kNan = std::numeric_limits<double>::quiet_NaN();
constexpr TailEstimate kTails[] = {TailEstimate::bucket, TailEstimate::k1, TailEstimate::k3,
                                   TailEstimate::reverse_bucket};

using Call = at::Tensor (*)(const at::Tensor&, const TopKReference&, const TopKKlOptions&);

struct Case {
  at::Tensor q, p;  // logits
  TopKReference reference;
};

Case random_case(at::ScalarType type, int64_t size) {
  at::manual_seed(2);
  Case out;
  out.q = (2 * at::randn({2, 5, 700}, at::kDouble)).to(type).slice(1, 0, 4);
  out.p = out.q.to(at::kDouble) + 0.5 * at::randn(out.q.sizes(), at::kDouble);
  const at::Tensor ids = std::get<1>(at::topk(out.q, size));
  const at::Tensor targets = at::randint(700, {2, 4}, at::kLong);
  if (size > 0) targets[0][1] = ids[0][1][0];
  targets[1][2] = -100;
  const at::Tensor log_p = at::log_softmax(out.p, -1);
  const at::Tensor place = targets.clamp_min(0).unsqueeze(-1);
  out.reference = {ids, head_logps(out.p, ids), targets, log_p.gather(-1, place).squeeze(-1)};
  return out;
}

// Values, and the gradient of a mixture of them.
std::vector<at::Tensor> results(Call call, const Case& in, const TopKKlOptions& options) {
  const at::Tensor q = in.q.detach().requires_grad_();
  const at::Tensor kl = call(q, in.reference, options);
  const at::Tensor a = at::linspace(-0.5, 2, kl.numel(), at::kDouble).view_as(kl);
  return {kl.detach(), torch::autograd::grad({(kl * a).sum()}, {q})[0]};
}

void expect_near(const at::Tensor& got, const at::Tensor& want, double tolerance,
                 const std::string& what) {
  ASSERT_EQ(got.sizes(), want.sizes()) << what;
  const at::Tensor gap = (got.to(at::kDouble) - want.to(at::kDouble)).abs();
  EXPECT_LE(gap.max().item<double>(), tolerance * (1 + want.abs().max().item<double>())) << what;
}

TEST(TopKKlTensors, KernelAndTensorOperationsAgree) {
  for (at::ScalarType type : {at::kFloat, at::kDouble, at::kBFloat16, at::kHalf}) {
    for (int64_t size : {0, 1, 20}) {
      for (TailEstimate tail : kTails) {
        const Case in = random_case(type, size);
        Case wide = in;
        wide.q = in.q.to(at::kDouble);
        const TopKKlOptions options{.temperature = 0.9, .tail = tail, .precision = 0x1p-40};
        const auto want = results(detail::top_k_kl_any_device, wide, options);
        for (Call call : {top_k_kl, detail::top_k_kl_any_device}) {
          const auto got = results(call, in, options);
          EXPECT_EQ(got[0].scalar_type(), type == at::kDouble ? at::kDouble : at::kFloat);
          EXPECT_EQ(got[1].scalar_type(), type);
          const double rounding = type == at::kBFloat16 ? 0x1p-8 : type == at::kHalf ? 0x1p-10 : 0;
          const double tolerance = type == at::kDouble ? 1e-12 : 1e-5;
          expect_near(got[0], want[0], tolerance, c10::toString(type));
          expect_near(got[1], want[1], tolerance + rounding, c10::toString(type));
          EXPECT_EQ(got[0][1][2].item<double>(), 0);
          EXPECT_EQ(got[1][1][2].abs().max().item<double>(), 0);
        }
      }
    }
  }
}

TEST(TopKKlTensors, WholeVocabularyIsCategoricalKl) {
  Case in = random_case(at::kDouble, 700);
  in.reference.targets.fill_(3);
  for (TailEstimate tail : kTails) {
    const TopKKlOptions options{.tail = tail, .precision = 0x1p-52};
    const at::Tensor q = in.q.detach().requires_grad_();
    const CategoricalKl both = categorical_kl(q, in.p);
    const at::Tensor kl = tail == TailEstimate::reverse_bucket ? both.reverse_kl : both.kl;
    expect_near(top_k_kl(in.q, in.reference, options), kl, 1e-13, "value");
    const at::Tensor want = torch::autograd::grad({kl.sum()}, {q})[0];
    const at::Tensor own = in.q.detach().requires_grad_();
    const at::Tensor sum = top_k_kl(own, in.reference, options).sum();
    expect_near(torch::autograd::grad({sum}, {own})[0], want, 1e-13, "gradient");
  }
}

TEST(TopKKlTensors, IgnoredPositionsMayHoldAnything) {
  for (Call call : {top_k_kl, detail::top_k_kl_any_device}) {
    const Case clean = random_case(at::kFloat, 5);
    Case in = clean;
    in.q = in.q.clone();
    in.q[1][2].fill_(kNan);
    in.reference.head_ids = in.reference.head_ids.clone();
    in.reference.head_ids[1][2].fill_(-3);
    in.reference.head_logps = in.reference.head_logps.clone();
    in.reference.head_logps[1][2].fill_(kNan);
    in.reference.target_logps = in.reference.target_logps.clone();
    in.reference.target_logps[1][2].fill_(kNan);
    for (TailEstimate tail : kTails) {
      const auto got = results(call, in, {.tail = tail});
      const auto want = results(call, clean, {.tail = tail});
      EXPECT_TRUE(at::equal(got[0], want[0]));
      EXPECT_TRUE(at::equal(got[1], want[1]));
    }
  }
}

// float32 beside float64: 16 of 17 columns are the head, whose rest is a small difference.
TEST(TopKKlTensors, ASmallTailKeepsItsDigits) {
  at::manual_seed(0);
  const at::Tensor q = at::randn({400, 17}), ids = std::get<1>(q.topk(16));
  const at::Tensor log_p = at::log_softmax(q + 0.1 * at::randn_like(q), -1);
  for (TailEstimate tail : {TailEstimate::bucket, TailEstimate::reverse_bucket}) {
    const TopKKlOptions options{.tail = tail, .precision = 0x1p-23};
    TopKReference p;
    p.head_ids = ids;
    p.head_logps = log_p.gather(-1, ids);
    const auto gradients = [&](Call call, at::ScalarType type) {
      const at::Tensor x = q.to(type).requires_grad_();
      const at::Tensor kl = call(x, p, options);
      return std::array{kl.detach(), torch::autograd::grad({kl.sum()}, {x})[0]};
    };
    const auto want = gradients(detail::top_k_kl_any_device, at::kDouble);
    for (Call call : {top_k_kl, detail::top_k_kl_any_device}) {
      const auto got = gradients(call, at::kFloat);
      for (size_t i = 0; i < 2; ++i) {
        EXPECT_LT((got[i] - want[i]).square().mean().sqrt().item<double>(), 1.5e-8);
      }
    }
  }
}

TEST(TopKKlTensors, BucketNeedsNoSamples) {
  Case in = random_case(at::kDouble, 8);
  const TopKKlOptions options{.tail = TailEstimate::bucket};
  const at::Tensor want = results(top_k_kl, in, options)[0];
  in.reference.targets = in.reference.target_logps = at::Tensor();
  for (Call call : {top_k_kl, detail::top_k_kl_any_device}) {
    const at::Tensor got = results(call, in, options)[0];
    EXPECT_GT(got[1][2].item<double>(), 0);  // nothing is ignored
    got[1][2] = 0;
    expect_near(got, want, 1e-12, "bucket");
  }
}

TEST(TopKKlTensors, HeadLogpsAreThoseOfTheRow) {
  for (at::ScalarType type : {at::kFloat, at::kDouble, at::kBFloat16}) {
    const Case in = random_case(type, 6);
    const at::Tensor got = head_logps(in.q.requires_grad_(), in.reference.head_ids, 0.7);
    EXPECT_FALSE(got.requires_grad());
    EXPECT_EQ(got.scalar_type(), type == at::kDouble ? at::kDouble : at::kFloat);
    const at::Tensor whole = at::log_softmax(in.q.to(at::kDouble) / 0.7, -1);
    expect_near(got, whole.gather(-1, in.reference.head_ids), type == at::kDouble ? 1e-14 : 1e-6,
                c10::toString(type));
  }
}

TEST(TopKKlTensors, RunawaySamplesAgree) {
  for (at::ScalarType type : {at::kFloat, at::kDouble}) {
    for (double y : {20.0, 45.0, 80.0, 200.0}) {
      const auto options = at::dtype(type);
      const Case in{.q = at::tensor({0.0, -3.0, -y}, options).unsqueeze(0),
                    .p = {},
                    .reference = {at::zeros({1, 1}, at::kLong), at::full({1, 1}, -2.0, options),
                                  at::full({1}, 2, at::kLong), at::full({1}, -1.0, options)}};
      const auto got = results(top_k_kl, in, {});
      const auto want = results(detail::top_k_kl_any_device, in, {});
      for (size_t i = 0; i < 2; ++i) {
        EXPECT_TRUE(at::allclose(got[i], want[i], 1e-4, 1e-4)) << got[i] << want[i];
        EXPECT_TRUE(at::isfinite(got[i]).all().item<bool>()) << got[i];
      }
    }
  }
}

TEST(TopKKlTensors, IdsChangedBeforeBackwardAreNoticed) {
  const Case in = random_case(at::kDouble, 4);
  const at::Tensor kl = top_k_kl(in.q.detach().requires_grad_(), in.reference).sum();
  in.reference.head_ids.add_(1);
  EXPECT_THROW(kl.backward(), c10::Error);
}

TEST(TopKKlTensors, NoPositionsIsFine) {
  const at::Tensor q = at::zeros({0, 7}).requires_grad_();
  const TopKReference p = {at::zeros({0, 2}, at::kLong), at::zeros({0, 2}),
                           at::zeros({0}, at::kLong), at::zeros({0})};
  for (TailEstimate tail : kTails) {
    const at::Tensor kl = top_k_kl(q, p, {.tail = tail});
    EXPECT_EQ(kl.numel(), 0);
    EXPECT_EQ(torch::autograd::grad({kl.sum()}, {q})[0].sizes(), q.sizes());
  }
}

TEST(TopKKlTensors, SecondBackwardIsRefused) {
  const Case in = random_case(at::kDouble, 4);
  const at::Tensor q = in.q.detach().requires_grad_();
  const at::Tensor kl = top_k_kl(q, in.reference).square().sum();
  const at::Tensor first = torch::autograd::grad({kl}, {q}, {}, {}, /*create_graph=*/true)[0];
  EXPECT_THROW(first.square().sum().backward(), c10::NotImplementedError);
}

template <class Exception>
std::string refusal(const at::Tensor& q, const TopKReference& p,
                    const TopKKlOptions& options = {}) {
  try {
    top_k_kl(q, p, options);
  } catch (const Exception& error) {
    return error.what_without_backtrace();
  }
  return "no error";
}

TEST(TopKKlTensors, BadInputIsRefused) {
  const at::Tensor q = at::zeros({2, 3, 9});
  const TopKReference good = {at::arange(4).expand({2, 3, 4}).clone(), at::full({2, 3, 4}, -2.5),
                              at::zeros({2, 3}, at::kLong), at::full({2, 3}, -2.5)};
  using Value = c10::ValueError;
  EXPECT_EQ(refusal<Value>(q, good), "no error");
  TopKReference p = good;
  p.head_ids = at::zeros({2, 4}, at::kLong);
  EXPECT_EQ(refusal<Value>(q, p),
            "top_k_kl: head_ids must be [..., k] like q_logits [2, 3, 9], got [2, 4]");
  p.head_ids = at::zeros({2, 3, 4});
  EXPECT_EQ(refusal<c10::TypeError>(q, p),
            "top_k_kl: head_ids must be int32 or int64, got float32");
  p = good;
  p.head_ids = good.head_ids.clone();
  p.head_ids[1][2][3] = 9;
  EXPECT_EQ(refusal<c10::IndexError>(q, p),
            "top_k_kl: head_ids must be in [0, 9), got 9 at [1, 2, 3]");
  p.head_ids[1][2][3] = 0;
  EXPECT_EQ(refusal<Value>(q, p),
            "top_k_kl: head_ids must be all different in a row, got 0 again at [5, 3]");
  p = good;
  p.head_logps = good.head_logps.slice(-1, 1);
  EXPECT_EQ(refusal<Value>(q, p),
            "top_k_kl: head_logps must be [2, 3, 4] like head_ids, got [2, 3, 3]");
  p.head_logps = good.head_logps.clone().requires_grad_();
  EXPECT_EQ(refusal<Value>(q, p),
            "top_k_kl: head_logps must not require grad, got a tensor that does. It is a constant "
            "of the loss: pass head_logps.detach()");
  p = good;
  p.targets = at::Tensor();
  EXPECT_EQ(refusal<Value>(q, p), "top_k_kl: targets must be given, got none");
  p.targets = at::full({2, 3}, 9, at::kLong);
  EXPECT_EQ(refusal<c10::IndexError>(q, p),
            "top_k_kl: targets must be in [0, 9) or ignore_index -100, got 9 at [0, 0]");
  p = good;
  p.target_logps = at::Tensor();
  EXPECT_EQ(refusal<Value>(q, p), "top_k_kl: target_logps must be given, got none");
  EXPECT_EQ(refusal<Value>(q, good, {.temperature = 0}),
            "top_k_kl: temperature must be in [1e-06, 1e+06], got 0");
  EXPECT_EQ(refusal<Value>(q, good, {.precision = 0}).substr(0, 30),
            "top_k_kl: precision must be in");
  EXPECT_EQ(refusal<Value>(at::Tensor(), good), "top_k_kl: q_logits must be given, got none");
  EXPECT_EQ(refusal<Value>(at::zeros({2, 3, 0}), good),
            "top_k_kl: q_logits must be [..., V] with V at least 1, got [2, 3, 0]");
}

}  // namespace
}  // namespace tether
