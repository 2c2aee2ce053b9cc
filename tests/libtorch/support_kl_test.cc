// categorical_kl over kept ids.

#include <ATen/ATen.h>
#include <gtest/gtest.h>
#include <torch/csrc/autograd/autograd.h>

#include <cmath>
#include <limits>
#include <string>
#include <vector>

#include "libtorch/support.h"
#include "tests/libtorch/kl_results.h"
#include "tests/libtorch/message.h"

namespace tether {
namespace {

constexpr int64_t kVocabulary = 40, kSize = 5;
constexpr double kNan = std::numeric_limits<double>::quiet_NaN();

// Six tokens: the first without a set, the third ignored, the last with a target that its set
// lacks. `counts` says which columns do.
struct Batch {
  at::Tensor targets, ids, counts;
};

Batch some_batch() {
  at::manual_seed(3);
  Batch out{at::zeros({2, 3}, at::kLong),
            std::get<1>(at::rand({2, 3, kVocabulary}).sort(-1)).slice(-1, 0, kSize).clone(),
            at::zeros({2, 3, kVocabulary}, at::kBool)};
  out.targets.copy_(out.ids.select(-1, 2));
  out.ids[0][0].fill_(-1);
  out.ids[0][1].slice(0, 3).fill_(-1);
  out.targets[0][2] = -100;
  const at::Tensor last = out.ids[1][2];
  while ((last == out.targets[1][2]).any().item<bool>()) {
    out.targets[1][2] = (out.targets[1][2] + 1).remainder(kVocabulary);
  }
  for (int64_t i = 0; i < 6; ++i) {
    const at::Tensor set = out.ids.view({6, kSize})[i], row = out.counts.view({6, -1})[i];
    row.index_fill_(0, set.index({set >= 0}), true);
    const auto target = out.targets.view({6})[i].item<int64_t>();
    if (target >= 0) row[target] = true;
    if ((set < 0).all().item<bool>()) row.fill_(true);
    if (target < 0) row.fill_(false);
  }
  return out;
}

CategoricalKl by_definition(const at::Tensor& q, const at::Tensor& p, const at::Tensor& counts,
                            double temperature) {
  const at::Tensor others = counts.logical_not(), ignored = others.all(-1);
  const auto log_softmax = [&](const at::Tensor& x) {
    const at::Tensor cut = x.masked_fill(others, -1e300).masked_fill(ignored.unsqueeze(-1), 0);
    return at::log_softmax(cut / temperature, -1);
  };
  const at::Tensor log_q = log_softmax(q), log_p = log_softmax(p);
  const auto mean = [&](const at::Tensor& of, const at::Tensor& what) {
    return (of.exp() * what.masked_fill(others, 0)).sum(-1).masked_fill(ignored, 0);
  };
  return {mean(log_q, log_q - log_p), mean(log_p, log_p - log_q), -mean(log_q, log_q)};
}

// On the CPU and by the path of other devices, whose ids are masked by its caller.
TEST(SupportKl, MatchesTheDefinition) {
  const Batch batch = some_batch();
  const Support kept = support(batch.targets, batch.ids);
  const CategoricalKlOptions options{.temperature = 0.7};
  for (const at::ScalarType type : {at::kDouble, at::kFloat}) {
    const at::Tensor q = at::randn({2, 3, kVocabulary}, at::kDouble).to(type),
                     p = at::randn({2, 3, kVocabulary}, at::kDouble).to(type);
    const auto want = results(
        [&](const at::Tensor& x, const at::Tensor& y) {
          return by_definition(x, y, batch.counts, options.temperature);
        },
        q.to(at::kDouble), p.to(at::kDouble));
    const double tolerance = type == at::kDouble ? 1e-13 : 1e-5;
    expect_same(results([&](const at::Tensor& x,
                            const at::Tensor& y) { return categorical_kl(x, y, options, kept); },
                        q, p),
                want, tolerance);
    CategoricalKlOptions masked = options;
    masked.mask = batch.targets >= 0;
    expect_same(results(
                    [&](const at::Tensor& x, const at::Tensor& y) {
                      return detail::categorical_kl_any_device(x, y, masked, kept);
                    },
                    q, p),
                want, tolerance);
  }
}

TEST(SupportKl, NothingElseIsReadAndAMaskTakesMoreOut) {
  const Batch batch = some_batch();
  Support kept = support(batch.targets, batch.ids);
  const at::Tensor q = at::randn({2, 3, kVocabulary}, at::kDouble),
                   p = at::randn({2, 3, kVocabulary}, at::kDouble);
  CategoricalKlOptions options;
  options.mask = at::ones({2, 3}, at::kBool);
  options.mask[1][0] = false;
  const auto call = [&](const at::Tensor& x, const at::Tensor& y) {
    return categorical_kl(x, y, options, kept);
  };
  const at::Tensor counts = batch.counts.logical_and(options.mask.unsqueeze(-1));
  const auto want = results(
      [&](const at::Tensor& x, const at::Tensor& y) { return by_definition(x, y, counts, 1); }, q,
      p);
  const at::Tensor others = counts.logical_not();
  kept.ids[1][0].fill_(kVocabulary + 7);  // of a position that is masked
  const auto got = results(call, q.masked_fill(others, kNan), p.masked_fill(others, kNan));
  expect_same(got, want, 1e-13);
  for (size_t i = 3; i < 5; ++i)
    EXPECT_TRUE((got[i].masked_select(others) == 0).all().item<bool>());
}

TEST(SupportKl, WrongOnesAreRefused) {
  const Batch batch = some_batch();
  const Support good = support(batch.targets, batch.ids);
  const at::Tensor q = at::randn({2, 3, kVocabulary});
  const auto with = [&](const at::Tensor& logits, const Support& given,
                        const CategoricalKlOptions& options = {}) {
    return message([&] { categorical_kl(logits, logits, options, given); });
  };
  EXPECT_EQ(with(q, {}), "categorical_kl: support must be given, got none");
  Support strange = good;
  strange.whole = good.ids;
  EXPECT_EQ(with(q, strange),
            "categorical_kl: support must be as tether::support makes it, got another");
  EXPECT_EQ(with(q.slice(1, 0, 2), good),
            "categorical_kl: support must be of q_logits [2, 2, 40], got [2, 3]");
  Support high = good;
  high.ids[1][1][0] = 41;
  EXPECT_EQ(with(q, high), "categorical_kl: support must have ids below 40, got 41");
  EXPECT_EQ(with(q, good, {.temperature = 0}),
            "categorical_kl: temperature must be in [1e-06, 1e+06], got 0");
}

TEST(SupportKl, ASecondDerivativeIsRefused) {
  const Batch batch = some_batch();
  const at::Tensor q = at::randn({2, 3, kVocabulary}).requires_grad_();
  const Support kept = support(batch.targets, batch.ids);
  const at::Tensor kl = categorical_kl(q, q.detach() + 1, {}, kept).entropies;
  const at::Tensor first = torch::autograd::grad({kl.square().sum()}, {q}, {}, std::nullopt,
                                                 /*create_graph=*/true)[0];
  EXPECT_NE(message([&] {
              torch::autograd::grad({first.square().sum()}, {q});
            }).find("the gradient must not be differentiated"),
            std::string::npos);
}

}  // namespace
}  // namespace tether
