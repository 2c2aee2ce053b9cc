// Rows at the ids that a sampler kept, on the way of CUDA tensors.

#include "libtorch/support.h"

#include <gtest/gtest.h>
#include <torch/torch.h>

#include <limits>
#include <string>
#include <vector>

#include "libtorch/categorical_kl.h"
#include "libtorch/token_logps.h"
#include "tests/libtorch/message.h"
#include "tests/libtorch_cuda/host_door.h"

namespace tether {
namespace {

constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();
constexpr int64_t kVocabulary = 40, kSize = 5;

// Tokens [3, 4]: the second ignored, one without a set, sets of one to five ids, some without the
// target.
struct Kept {
  at::Tensor targets, ids;
  at::Tensor absent;  // [3, 4, V]: columns outside of a token's set, all where it is ignored
  Support made;

  Kept() {
    torch::manual_seed(8);
    ids = std::get<1>(torch::rand({3, 4, kVocabulary}).sort(-1)).slice(-1, 0, kSize).clone();
    targets = torch::randint(kVocabulary, {3, 4}, at::kLong);
    targets[0] = ids[0].select(-1, 1);
    targets[0][1] = -100;
    ids[1].slice(-1, 2).fill_(-1);
    ids[2][0].fill_(-1);
    ids[2][1].slice(0, 1).fill_(-1);
    made = support(targets, ids);
    const at::Tensor inside = torch::zeros({3, 4, kVocabulary + 1}, at::kBool)
                                  .scatter(-1, at::where(made.ids < 0, kVocabulary, made.ids), true)
                                  .slice(-1, 0, kVocabulary);
    absent = inside.logical_or(made.whole.unsqueeze(-1)).logical_not();
  }

  // NaN where nobody may look.
  at::Tensor logits(at::ScalarType dtype, int64_t seed) const {
    torch::manual_seed(seed);
    return (2 * torch::randn({3, 4, kVocabulary})).to(dtype).masked_fill(absent, kNaN);
  }
};

at::Tensor upstream(double from) { return torch::linspace(from, 2, 12).view({3, 4}); }

Results evaluated(const at::Tensor& logits, const Kept& kept, TokenLogpsOptions options) {
  const at::Tensor x = logits.detach().clone().requires_grad_();
  options.row.temperature = 0.7;
  const TokenLogps out = token_logps(x, kept.targets, options, kept.made);
  at::Tensor sum = (upstream(-1) * out.logps).sum();
  if (options.entropies) sum = sum + (upstream(0.3) * out.entropies).sum();
  Results results{out.logps.detach(), torch::autograd::grad({sum}, {x})[0]};
  if (options.entropies) results.push_back(out.entropies.detach());
  if (!options.statistics) return results;
  results.insert(results.end(),
                 {out.sum_of_squared_p, out.mean_logits, out.target_is_largest.to(at::kFloat)});
  return results;
}

TEST(SupportOnCuda, LogpsAreThoseOfTheCpu) {
  const Kept kept;
  for (const at::ScalarType dtype : {at::kFloat, at::kBFloat16, at::kHalf}) {
    const at::Tensor logits = kept.logits(dtype, 1);
    for (const bool all : {false, true}) {
      const auto run = [&] {
        const Results out = evaluated(logits, kept, {.entropies = all, .statistics = all});
        EXPECT_EQ(out[1].masked_select(kept.absent).abs().max().item<double>(), 0);
        return out;
      };
      expect_as_on_cpu(run, 2, dtype == at::kFloat ? 1e-5 : 1e-2, all ? "all" : "logps");
    }
  }
}

TEST(SupportOnCuda, TheGradientMayGoIntoABuffer) {
  const Kept kept;
  const auto run = [&]() -> Results {
    const at::Tensor x = kept.logits(at::kFloat, 1).requires_grad_();
    const at::Tensor logits = x * 1;
    const TokenLogps out =
        token_logps(logits, kept.targets, {.gradient_buffer = logits.detach()}, kept.made);
    (out.logps * upstream(-1)).sum().backward();
    return {out.logps.detach(), x.grad()};
  };
  expect_as_on_cpu(run, 2, 1e-5, "in place");
}

TEST(SupportOnCuda, DivergencesAreThoseOfTheCpu) {
  const Kept kept;
  for (const at::ScalarType dtype : {at::kFloat, at::kBFloat16, at::kHalf}) {
    const at::Tensor q = kept.logits(dtype, 1), p = kept.logits(dtype, 2);
    at::Tensor mask = torch::ones({3, 4}, at::kBool);
    mask[1][1] = false;
    q[1][1] = kNaN;
    for (const bool with_p : {true, false}) {
      const auto run = [&]() -> Results {
        const at::Tensor x = q.clone().requires_grad_(), y = p.clone().requires_grad_(with_p);
        const CategoricalKl out =
            categorical_kl(x, y, {.temperature = 0.7, .mask = mask}, kept.made);
        const at::Tensor sum =
            (upstream(-1) * out.kl + upstream(0.3) * out.reverse_kl + upstream(-3) * out.entropies)
                .sum();
        sum.backward();
        return {out.kl.detach(), out.reverse_kl.detach(), out.entropies.detach(), x.grad(),
                y.grad()};
      };
      expect_as_on_cpu(run, 2, tolerance_of(dtype), "divergences");
    }
  }
}

// Nobody waits to look at them.
TEST(SupportOnCuda, IdsThatDoNotFitAreNaNForTheirRow) {
  const Kept kept;
  const at::Tensor logits = torch::randn({3, 4, kVocabulary});
  const auto spoiled = [&](const at::Tensor& targets, const Support& made) {
    const OnCuda door;
    const at::Tensor logps = token_logps(logits, targets, {}, made).logps;
    EXPECT_EQ(door.taken(), 1);
    return logps.isnan().view({-1}).nonzero().view({-1});
  };
  const auto at_place = [](int64_t place) { return at::tensor({place}, at::kLong); };
  EXPECT_EQ(spoiled(kept.targets, kept.made).numel(), 0);
  at::Tensor others = kept.targets.clone();
  others[0][2] = (others[0][2] + 1).remainder(kVocabulary);
  while ((kept.made.ids[0][2] == others[0][2]).any().item<bool>()) {
    others[0][2] = (others[0][2] + 1).remainder(kVocabulary);
  }
  EXPECT_TRUE(at::equal(spoiled(others, kept.made), at_place(2)));
  others = kept.targets.clone();
  others[0][1] = 0;  // ignored when the sets were made
  EXPECT_TRUE(at::equal(spoiled(others, kept.made), at_place(1)));
  others[0][1] = 7;
  EXPECT_TRUE(at::equal(spoiled(others, kept.made), at_place(1)));
  Support large = kept.made;
  large.ids = kept.made.ids.clone();
  large.ids[1][3][0] = kVocabulary;
  EXPECT_TRUE(at::equal(spoiled(kept.targets, large), at_place(7)));
}

TEST(SupportOnCuda, RefusesWithTheSentenceOfTheCpu) {
  const Kept kept;
  const at::Tensor logits = torch::randn({3, 4, kVocabulary});
  const auto said = [&](const at::Tensor& rows, const Support& made) {
    return message([&] { token_logps(rows, kept.targets.slice(0, 0, rows.size(0)), {}, made); });
  };
  Support lacking = kept.made;
  lacking.ids.reset();
  Support other = kept.made;
  other.ids = other.ids.to(at::kInt);
  for (const Support& each : {lacking, other}) {
    const std::string want = said(logits, each);
    EXPECT_NE(want, "no error");
    const OnCuda door;
    EXPECT_EQ(said(logits, each), want);
  }
  const std::string want = said(logits.slice(0, 0, 2), kept.made);
  EXPECT_EQ(want, "token_logps: support must be of targets [2, 4], got [3, 4]");
  const OnCuda door;
  EXPECT_EQ(said(logits.slice(0, 0, 2), kept.made), want);
}

// Tensors without memory: whoever looks into one throws.
TEST(SupportOnCuda, TheDoorWaitsForNothing) {
  detail::CudaKernels kernels = without_rows();
  kernels.categorical_kl = [](const at::Tensor& q, const at::Tensor&, const at::Tensor&, double,
                              const at::Tensor&) {
    return std::vector<at::Tensor>(3, q.select(-1, 0).clone());
  };
  Kept kept;
  for (at::Tensor* each :
       {&kept.targets, &kept.made.ids, &kept.made.position, &kept.made.whole, &kept.made.added}) {
    *each = each->to(at::kMeta);
  }
  const OnCuda door(kernels);
  const at::Tensor x = torch::randn({3, 4, kVocabulary}).to(at::kMeta).requires_grad_();
  const TokenLogps out =
      token_logps(x, kept.targets, {.entropies = true, .statistics = true}, kept.made);
  (out.logps + out.entropies).sum().backward();
  EXPECT_TRUE(x.grad().is_meta());
  EXPECT_TRUE(out.target_is_largest.is_meta());
  EXPECT_TRUE(categorical_kl(x.detach(), x.detach(), {}, kept.made).kl.is_meta());
}

}  // namespace
}  // namespace tether
