// Log-probabilities and the KL of two rows on the way of CUDA tensors.

#include <gtest/gtest.h>
#include <torch/torch.h>

#include <limits>
#include <string>

#include "libtorch/categorical_kl.h"
#include "libtorch/support.h"
#include "libtorch/token_logps.h"
#include "tests/libtorch/message.h"
#include "tests/libtorch_cuda/host_door.h"

namespace tether {
namespace {

constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

// Of rows that are not side by side, one of them ignored and not to be read.
struct Rows {
  at::Tensor logits, targets;

  explicit Rows(at::ScalarType dtype) {
    torch::manual_seed(4);
    logits = (3 * torch::randn({3, 4, 40})).to(dtype).slice(1, 1).slice(2, 0, 31);
    targets = torch::randint(31, {3, 3}, at::kLong);
    targets[1][1] = -100;
    logits.select(0, 1).select(0, 1).fill_(kNaN);
  }
};

at::Tensor leaf(const at::Tensor& tensor) { return tensor.detach().clone().requires_grad_(); }

// Log-probabilities, entropies and the gradient, of unlike upstream ones.
Results evaluated(const Rows& rows, TokenLogpsOptions options, bool with_logps = true,
                  bool with_entropies = true) {
  const at::Tensor x = rows.logits.detach().requires_grad_();
  options.entropies = with_entropies;
  const TokenLogps out = token_logps(x, rows.targets, options);
  const at::Tensor upstream = torch::linspace(-1, 2, 9).view({3, 3});
  at::Tensor sum = torch::zeros({}, out.logps.options());
  if (with_logps) sum = sum + (upstream * out.logps).sum();
  if (with_entropies) sum = sum + (upstream.flip(0) * out.entropies).sum();
  return {out.logps.detach(), with_entropies ? out.entropies.detach() : at::Tensor(),
          torch::autograd::grad({sum}, {x})[0]};
}

TEST(TokenLogpsOnCuda, AreThoseOfTheCpu) {
  for (const at::ScalarType dtype : {at::kFloat, at::kBFloat16, at::kHalf}) {
    const Rows rows(dtype);
    const TokenLogpsOptions options{.row = {.temperature = 0.7}};
    const double tolerance = dtype == at::kFloat ? 1e-5 : 1e-2;
    expect_as_on_cpu([&] { return evaluated(rows, options); }, 2, tolerance, "both");
    expect_as_on_cpu([&] { return evaluated(rows, options, true, false); }, 2, tolerance, "logps");
    expect_as_on_cpu([&] { return evaluated(rows, options, false, true); }, 2, tolerance,
                     "entropies");
  }
}

// Columns that are not there, a target that is the largest.
TEST(TokenLogpsOnCuda, FurtherStatisticsAreThoseOfTheCpu) {
  for (const at::ScalarType dtype : {at::kFloat, at::kBFloat16, at::kHalf}) {
    Rows rows(dtype);
    rows.logits.select(0, 1).select(0, 2).slice(0, 3, 9).fill_(
        -std::numeric_limits<double>::infinity());
    rows.logits[2][1][rows.targets[2][1].item<int64_t>()] = 30;
    for (const bool entropies : {false, true}) {
      const TokenLogpsOptions options{.row = {.temperature = 0.7, .scale = 1.3},
                                      .statistics = true};
      const auto run = [&] {
        Results out = evaluated(rows, options, true, entropies);
        const TokenLogps found = token_logps(rows.logits, rows.targets, options);
        out.insert(out.end(), {found.sum_of_squared_p, found.mean_logits,
                               found.target_is_largest.to(at::kFloat)});
        EXPECT_EQ(found.target_is_largest.scalar_type(), at::kBool);
        EXPECT_TRUE(found.target_is_largest[2][1].item<bool>());
        EXPECT_FALSE(found.entropies.defined());
        return out;
      };
      expect_as_on_cpu(run, 3, dtype == at::kFloat ? 1e-5 : 1e-2, "statistics");
    }
  }
}

TEST(TokenLogpsOnCuda, TakeTargetsOfInt32AndNoRows) {
  Rows rows(at::kFloat);
  rows.targets = rows.targets.to(at::kInt);
  expect_as_on_cpu([&] { return evaluated(rows, {}); }, 2, 1e-5, "int32");
  const at::Tensor none = torch::zeros({0, 7}), ids = torch::zeros({0}, at::kLong);
  expect_as_on_cpu([&]() -> Results { return {token_logps(none, ids).logps}; }, 1, 0, "no rows");
}

TEST(TokenLogpsOnCuda, WriteTheirGradientIntoABuffer) {
  for (const bool in_place : {false, true}) {
    const auto run = [&]() -> Results {
      const Rows rows(at::kFloat);
      const at::Tensor x = leaf(rows.logits).contiguous();
      const at::Tensor logits = x * 1;
      const at::Tensor buffer = in_place ? logits.detach() : at::empty_like(logits);
      const TokenLogps out = token_logps(logits, rows.targets, {.gradient_buffer = buffer});
      (out.logps * torch::linspace(-1, 2, 9).view({3, 3})).sum().backward();
      return {out.logps.detach(), x.grad(), buffer};
    };
    expect_as_on_cpu(run, 2, 1e-5, in_place ? "in place" : "a buffer");
  }
}

TEST(TokenLogpsOnCuda, TakeAnotherWayWhereThereIsNoKernel) {
  const Rows rows(at::kFloat);
  const OnCuda door;
  const at::Tensor wide = rows.logits.to(at::kDouble);
  token_logps(wide, rows.targets, {.statistics = true});
  const Support kept = support(rows.targets, torch::randint(31, {3, 3, 4}, at::kLong));
  token_logps(wide, rows.targets, {}, kept);
  EXPECT_EQ(door.taken(), 0);
}

TEST(TokenLogpsOnCuda, AnIdOutOfRangeIsNaNForItsRow) {
  Rows rows(at::kFloat);
  rows.targets[0][2] = 31;
  EXPECT_EQ(message([&] { token_logps(rows.logits, rows.targets); }),
            "token_logps: targets must be in [0, 31) or ignore_index -100, got 31 at [0, 2]");
  const OnCuda door;
  const at::Tensor logps = token_logps(rows.logits, rows.targets).logps;
  EXPECT_EQ(at::isnan(logps).sum().item<int64_t>(), 1);
  EXPECT_TRUE(std::isnan(logps[0][2].item<double>()));
}

TEST(TokenLogpsOnCuda, ASecondBackwardRaises) {
  const Rows rows(at::kFloat);
  const OnCuda door;
  const at::Tensor x = leaf(rows.logits);
  const at::Tensor sum = token_logps(x, rows.targets).logps.sum();
  const at::Tensor slope = torch::autograd::grad({sum}, {x}, {}, true, true)[0];
  EXPECT_EQ(message([&] { torch::autograd::grad({slope.sum()}, {x}); }).substr(0, 55),
            "token_logps: the gradient must not be differentiated ag");
}

// ---- the KL of two rows -------------------------------------------------------------------------

Results kl_of(const at::Tensor& q, const at::Tensor& p, const CategoricalKlOptions& options,
              std::vector<size_t> which, bool with_p = true) {
  const at::Tensor x = q.detach().requires_grad_(), y = p.detach().requires_grad_(with_p);
  const CategoricalKl out = categorical_kl(x, y, options);
  const std::vector<at::Tensor> values{out.kl, out.reverse_kl, out.entropies};
  at::Tensor sum = torch::zeros({}, out.kl.options());
  for (const size_t i : which) {
    sum = sum + (torch::linspace(-1, 2 + double(i), 6).view({2, 3}) * values[i]).sum();
  }
  Results gradients = with_p ? torch::autograd::grad({sum}, {x, y}, {}, {}, false, true)
                             : torch::autograd::grad({sum}, {x});
  for (const at::Tensor& each : values) gradients.push_back(each.detach());
  return gradients;
}

TEST(CategoricalKlOnCuda, IsThatOfTheCpu) {
  torch::manual_seed(2);
  for (const at::ScalarType dtype : {at::kFloat, at::kBFloat16, at::kHalf}) {
    const at::Tensor memory = (2 * torch::randn({2, 3, 40})).to(dtype);
    const at::Tensor p = (2 * torch::randn({3, 2, 31})).to(dtype).transpose(0, 1);
    at::Tensor q = memory.slice(2, 1, 32);
    const double tolerance = tolerance_of(dtype);
    for (const std::vector<size_t>& which : {std::vector<size_t>{0, 1, 2}, {0}, {2}}) {
      expect_as_on_cpu([&] { return kl_of(q, p, {.temperature = 0.7}, which); }, 2, tolerance,
                       "all rows");
    }
    const at::Tensor mask = at::tensor({1, 0, 1, 1, 1, 1}).to(at::kBool).view({2, 3});
    q = q.clone();
    q.select(0, 0).select(0, 1).fill_(kNaN);
    expect_as_on_cpu([&] { return kl_of(q, p, {.mask = mask}, {0, 1, 2}); }, 2, tolerance,
                     "masked");
    expect_as_on_cpu([&] { return kl_of(q, p, {.mask = mask}, {0}, false); }, 2, tolerance,
                     "one gradient");
  }
}

TEST(CategoricalKlOnCuda, TakesAnotherWayInFloat64) {
  const at::Tensor q = torch::randn({2, 3, 7}, at::kDouble);
  const OnCuda door;
  categorical_kl(q, q);
  EXPECT_EQ(door.taken(), 0);
}

}  // namespace
}  // namespace tether
