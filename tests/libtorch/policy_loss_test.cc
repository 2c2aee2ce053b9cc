#include "libtorch/policy_loss.h"

#include <gtest/gtest.h>
#include <torch/torch.h>

#include <functional>
#include <string>

#include "libtorch/advantage.h"

namespace tether {
namespace {

template <class Expected, class Call>
std::string message(Call call) {
  try {
    call();
  } catch (const Expected& error) {
    return static_cast<const c10::Error&>(error).msg();
  } catch (const std::exception& error) {
    return std::string("another error: ") + error.what();
  }
  return "no error";
}

PolicyBatch random_batch(int64_t rows, int64_t columns, at::ScalarType dtype = at::kFloat) {
  torch::manual_seed(7);
  const auto options = at::dtype(dtype);
  const at::Tensor logps = torch::randn({rows, columns}, options) - 2;
  return {.logps = logps.clone().requires_grad_(),
          .advantages = torch::randn({rows}, options),
          .response_mask = torch::rand({rows, columns}) > 0.25,
          .old_logps = logps + 0.3 * torch::randn({rows, columns}, options),
          .ref_logps = logps + 0.3 * torch::randn({rows, columns}, options),
          .rollout_logps = logps + 0.3 * torch::randn({rows, columns}, options)};
}

at::Tensor gradient(const at::Tensor& loss, const at::Tensor& logps) {
  return torch::autograd::grad({loss}, {logps}, {}, /*retain_graph=*/true)[0];
}

// PPO as people write it, by torch's operations in float64.
TEST(PolicyLossFace, EqualsThePlainExpressionInValueAndGradient) {
  const PolicyBatch batch = random_batch(5, 33, at::kDouble);
  const LossOutput out = ppo_loss(batch, {.epsilon_low = 0.1, .epsilon_high = 0.3});
  const at::Tensor logps = batch.logps.detach().clone().requires_grad_();
  const at::Tensor ratio = (logps - batch.old_logps).exp();
  const at::Tensor A = batch.advantages.unsqueeze(1);
  const at::Tensor loss = -at::minimum(ratio * A, ratio.clamp(0.9, 1.3) * A);
  const at::Tensor mean = (loss * batch.response_mask).sum() / batch.response_mask.sum();
  EXPECT_NEAR(out.loss.item<double>(), mean.item<double>(), 1e-15);
  EXPECT_LT((gradient(out.loss, batch.logps) - gradient(mean, logps)).abs().max().item<double>(),
            1e-16);
}

TEST(PolicyLossFace, TokenLossesAddUpToTheLoss) {
  for (const auto& row : kCatalogue) {
    PolicyObjective objective = row.preset();
    objective.aggregation = token_mean();
    objective.kl.beta = 0.2;
    objective.entropy.coefficient = 0.1;
    PolicyBatch batch = random_batch(5, 33, at::kDouble);
    batch.entropies = torch::rand({5, 33}, at::kDouble).requires_grad_();
    const at::Tensor mask = batch.response_mask.to(at::kDouble);
    const at::Tensor each = policy_token_losses(batch, objective);
    EXPECT_EQ(each.masked_select(mask == 0).abs().sum().item<double>(), 0);
    const at::Tensor loss = (mask * each).sum() / mask.sum();
    const LossOutput want = policy_loss(batch, objective);
    EXPECT_NEAR(loss.item<double>(), want.loss.item<double>(), 1e-13) << row.name;
    for (const at::Tensor& input : {batch.logps, batch.entropies}) {
      const at::Tensor gap = gradient(loss, input) - gradient(want.loss, input);
      EXPECT_LT(gap.abs().max().item<double>(), 1e-14) << row.name;
    }
  }
}

TEST(PolicyLossFace, TokenLossesTakeAnyUpstreamGradient) {
  for (RatioLevel level :
       {RatioLevel::token, RatioLevel::sequence_mean, RatioLevel::sequence_sum}) {
    PolicyObjective objective = presets::ppo();
    objective.level = level;
    PolicyBatch batch = random_batch(3, 7, at::kDouble);
    batch.old_logps = batch.logps.detach() + 0.01 * torch::randn({3, 7}, at::kDouble);
    const at::Tensor upstream = torch::randn({3, 7}, at::kDouble);
    const auto loss = [&](const at::Tensor& logps) {
      PolicyBatch at = batch;
      at.logps = logps;
      return (upstream * policy_token_losses(at, objective)).sum();
    };
    const at::Tensor slopes = gradient(loss(batch.logps), batch.logps);
    const double step = 1e-6;
    for (int64_t i = 0; i < 21; i += 4) {
      at::Tensor up = batch.logps.detach().clone(), down = up.clone();
      up.view({-1})[i] += step;
      down.view({-1})[i] -= step;
      const double slope = (loss(up) - loss(down)).item<double>() / (2 * step);
      EXPECT_NEAR(slopes.view({-1})[i].item<double>(), slope, 1e-7);
    }
  }
}

void expect_equal_paths(const PolicyBatch& batch, const PolicyObjective& objective) {
  const LossOutput kernel = policy_loss(batch, objective);
  const LossOutput tensors = detail::policy_loss_any_device(batch, objective);
  EXPECT_NEAR(kernel.loss.item<double>(), tensors.loss.item<double>(), 1e-14);
  for (const at::Tensor& input : {batch.logps, batch.entropies}) {
    if (!input.defined()) continue;
    const at::Tensor difference = gradient(kernel.loss, input) - gradient(tensors.loss, input);
    EXPECT_LT(difference.abs().max().item<double>(), 1e-15);
  }
  const auto expected = kernel.metrics.to_map();
  for (const auto& [name, value] : tensors.metrics.to_map()) {
    EXPECT_NEAR(value, expected.at(name), 1e-13) << name;
  }
}

TEST(PolicyLossFace, EveryDevicePathEqualsTheKernel) {
  const PolicyBatch batch = random_batch(5, 33, at::kDouble);
  for (const CatalogueRow& row : kCatalogue) {
    SCOPED_TRACE(row.name);
    expect_equal_paths(batch, row.preset());
  }
}

TEST(PolicyLossFace, EveryDevicePathEqualsTheKernelForEveryPenaltyAndLevel) {
  const PolicyBatch batch = random_batch(4, 19, at::kDouble);
  for (std::string_view estimator : kKlFormNames) {
    for (std::string_view source : kKlFormNames) {
      for (std::string_view correction : kKlCorrectionNames) {
        for (std::string_view level : kRatioLevelNames) {
          PolicyObjective objective = presets::grpo(0.3);
          set_choice("test", objective, "kl_estimator", estimator);
          set_choice("test", objective, "kl_gradient", source);
          set_choice("test", objective, "kl_correction", correction);
          set_choice("test", objective, "allow_biased_gradient", "true");
          set_choice("test", objective, "level", level);
          SCOPED_TRACE(std::string(estimator) + " " + std::string(source) + " " +
                       std::string(correction) + " " + std::string(level));
          expect_equal_paths(batch, objective);
        }
      }
    }
  }
}

TEST(PolicyLossFace, RowsAreDividedByGivenLengthsOfAnyType) {
  PolicyBatch batch = random_batch(5, 33, at::kDouble);
  const PolicyObjective objective = presets::grpo(0.1);
  const at::Tensor tokens = batch.response_mask.sum(1);
  const double plain = policy_loss(batch, objective).loss.item<double>();
  for (const at::ScalarType type : {at::kDouble, at::kFloat, at::kShort, at::kLong}) {
    batch.row_tokens = (2 * tokens).to(type);
    EXPECT_NEAR(policy_loss(batch, objective).loss.item<double>(), plain / 2, 1e-15);
    expect_equal_paths(batch, objective);
  }
}

TEST(PolicyLossFace, EntropiesGetTheirOwnGradient) {
  PolicyBatch batch = random_batch(4, 19, at::kDouble);
  batch.entropies = torch::rand({4, 19}, at::kDouble);
  batch.entropies.masked_fill_(batch.response_mask.logical_not(), NAN).requires_grad_();
  PolicyObjective objective = presets::gspo();
  objective.entropy.coefficient = 0.1;
  expect_equal_paths(batch, objective);
  const LossOutput out = policy_loss(batch, objective);
  const at::Tensor tokens = batch.response_mask.sum(1, true);
  EXPECT_TRUE(at::allclose(gradient(3 * out.loss, batch.entropies),
                           -0.3 / 4 * batch.response_mask.to(at::kDouble) / tokens, 1e-14, 1e-17));
  const at::Tensor once = torch::autograd::grad({out.loss}, {batch.entropies}, {}, true, true)[0];
  EXPECT_THROW(torch::autograd::grad({once.sum()}, {batch.entropies}), c10::Error);
}

TEST(PolicyLossFace, EveryDevicePathCountsNonfiniteTokensLikeTheKernel) {
  PolicyBatch batch = random_batch(3, 20, at::kDouble);
  const double inf = std::numeric_limits<double>::infinity();
  batch.response_mask = torch::ones({3, 20});
  batch.old_logps[0][3] = inf;
  batch.old_logps[2][1] = NAN;
  batch.ref_logps[1][7] = NAN;
  batch.advantages[2] = -inf;
  for (const CatalogueRow& row : kCatalogue) {
    const auto expected = policy_loss(batch, row.preset()).metrics.to_map();
    const auto found = detail::policy_loss_any_device(batch, row.preset()).metrics.to_map();
    for (const char* name : {"nonfinite", "ratio_max", "ratio_min"}) {
      EXPECT_DOUBLE_EQ(found.at(name), expected.at(name)) << row.name << " " << name;
    }
  }
}

// A product with a factor that overflows on its way beside a slope of 0.
TEST(PolicyLossFace, EveryDevicePathHasFiniteGradientsOfAnyFactor) {
  const at::Tensor logps = torch::tensor({{-0.5f, -0.8f, -0.1f, -3.0f}}).requires_grad_(true);
  const PolicyBatch batch{.logps = logps,
                          .advantages = torch::tensor({{1e18f, -1e18f, 1e18f, -1e18f}}),
                          .response_mask = torch::tensor({{1.0f, 0.5f, 1.0f, 1.0f}}),
                          .old_logps = logps.detach() - torch::tensor({{0.1f, -0.2f, 1.0f, -1.0f}}),
                          .rollout_logps = logps.detach()};
  for (const double count : {0x1p-126, 1e-30, 1e10}) {
    const Normalizer normalizer{.policy = count, .sequences = count, .world_size = 1e30};
    for (const CatalogueRow& row : kCatalogue) {
      PolicyObjective objective = row.preset();
      objective.kl.beta = 0;
      const auto gradient = [&](const LossOutput& out) {
        EXPECT_TRUE(std::isfinite(out.loss.item<double>())) << row.name;
        return torch::autograd::grad({out.loss}, {logps})[0];
      };
      const at::Tensor expected = gradient(policy_loss(batch, objective, normalizer));
      const at::Tensor found =
          gradient(detail::policy_loss_any_device(batch, objective, normalizer));
      EXPECT_TRUE(at::allclose(found, expected, 1e-3)) << row.name << found << expected;
    }
  }
}

TEST(PolicyLossFace, AColumnOfAdvantagesIsPerRowThoughThereAreAsManyTokens) {
  const PolicyBatch batch{.logps = torch::tensor({-1., -2.}),
                          .advantages = torch::tensor({{1.}, {5.}}),
                          .response_mask = torch::ones(2),
                          .offsets = torch::tensor({0, 2, 2})};  // both tokens are of row 0
  EXPECT_EQ(ppo_loss(batch).loss.item<double>(), -1);
  EXPECT_EQ(detail::policy_loss_any_device(batch, presets::ppo()).loss.item<double>(), -1);
}

TEST(PolicyLossFace, EveryDevicePathSpoilsTokensLikeTheKernel) {
  for (double infinite : {INFINITY, -INFINITY}) {
    for (at::Tensor PolicyBatch::* array :
         {&PolicyBatch::old_logps, &PolicyBatch::ref_logps, &PolicyBatch::advantages}) {
      PolicyBatch batch = random_batch(3, 20, at::kDouble);
      batch.response_mask = torch::ones({3, 20});
      (batch.*array)[1] = infinite;
      const at::Tensor kernel = policy_loss(batch, presets::grpo(0.04)).loss;
      const at::Tensor tensors = detail::policy_loss_any_device(batch, presets::grpo(0.04)).loss;
      EXPECT_TRUE(std::isnan(kernel.item<double>()) && std::isnan(tensors.item<double>()));
      const at::Tensor dlogps = gradient(tensors, batch.logps);
      EXPECT_TRUE(at::equal(dlogps.isnan(), gradient(kernel, batch.logps).isnan()));
      EXPECT_EQ(dlogps.isnan().sum().item<int64_t>(), 20);
    }
  }
}

TEST(PolicyLossFace, MetricsComeToTheHostFromAnyTypeButNotFromAnyShape) {
  PolicyMetricTensors metrics = ppo_loss(random_batch(3, 20)).metrics;
  const auto expected = metrics.to_map();
  metrics.sums = metrics.sums.to(at::kFloat);  // as after an all-reduce in float32
  EXPECT_FLOAT_EQ(metrics.to_map().at("ratio_mean"), expected.at("ratio_mean"));
  EXPECT_EQ(metrics.to_map().at("tokens"), expected.at("tokens"));
  metrics.maxima = at::Tensor();
  EXPECT_EQ(message<c10::ValueError>([&] { metrics.to_host(); }),
            "policy_metrics: sums and maxima must be the blocks of a loss");
}

TEST(PolicyLossFace, EveryDevicePathChecksTheNormalizer) {
  const PolicyBatch batch = random_batch(3, 20);
  EXPECT_EQ(message<c10::ValueError>(
                [&] { detail::policy_loss_any_device(batch, presets::ppo(), {.world_size = 0}); }),
            "policy_loss: normalizer.world_size must be greater than 0 and finite, got 0");
  EXPECT_EQ(message<c10::ValueError>(
                [&] { detail::policy_loss_any_device(batch, presets::ppo(), {.policy = NAN}); }),
            "policy_loss: normalizer.policy must be at least 0 and finite, got nan");
}

TEST(PolicyLossFace, UpstreamGradientsAreNotRoundedToTheTypeOfLogps) {
  const PolicyBatch batch = random_batch(4, 16, at::kBFloat16);
  const at::Tensor loss = ppo_loss(batch).loss;
  const double upstream = 1.001;  // 1 in bfloat16
  const at::Tensor scaled = gradient(loss * upstream, batch.logps);
  const at::Tensor once = gradient(loss, batch.logps).to(at::kFloat);
  EXPECT_TRUE(at::equal(scaled, (once * float(upstream)).to(at::kBFloat16)));
}

TEST(PolicyLossFace, ALossScaleReachesGradientsThatFloat16WouldFlush) {
  const PolicyBatch batch{.logps = torch::full({1, 4096}, -1, at::kHalf).requires_grad_(),
                          .advantages = torch::full({1}, 1e-4, at::kFloat),
                          .response_mask = torch::ones({1, 4096}, at::kBool)};
  for (const LossOutput& out :
       {ppo_loss(batch), detail::policy_loss_any_device(batch, presets::ppo())}) {
    const double scaled = gradient(out.loss * 65536, batch.logps)[0][0].item<double>();
    EXPECT_NEAR(scaled, -1e-4 * 16, 1e-6);
    EXPECT_EQ(gradient(out.loss, batch.logps).scalar_type(), at::kHalf);
  }
}

struct Cubic {
  template <class Number, class Constant>
  TETHER_FORMULA Number operator()(const Token<Number, Constant>& token) const {
    return abs(token.log_ratio) * token.log_ratio * token.log_ratio - token.advantage * token.logp;
  }
};

struct NeverWrapped : Cubic {};

struct NoGradient {
  template <class Number, class Constant>
  TETHER_FORMULA Number operator()(const Token<Number, Constant>& token) const {
    return token.old_logp * token.advantage;
  }
};

TEST(PolicyLossFace, ASurrogateWithoutGradientHasAGradientOf0) {
  const PolicyBatch batch = random_batch(3, 20, at::kDouble);
  PolicyObjective objective = presets::ppo();
  objective.surrogate = on_any_device(NoGradient{});
  for (const LossOutput& out :
       {policy_loss(batch, objective), detail::policy_loss_any_device(batch, objective)}) {
    EXPECT_EQ(gradient(out.loss, batch.logps).abs().max().item<double>(), 0);
  }
}

struct Quartic {
  template <class Number>
  TETHER_FORMULA Number operator()(const Number& d) const {
    return d * d * d * d;
  }
};

struct QuarticNeverWrapped : Quartic {};
// With a score of its own.
struct QuarticWithScore : Quartic {
  template <class Constant>
  TETHER_FORMULA Constant score(const Constant& d) const {
    return d * d * d * (d - 4);
  }
};

TEST(PolicyLossFace, AUsersFormOfTheKlRunsOnEveryDeviceOnceItIsWrapped) {
  const PolicyBatch batch = random_batch(3, 20, at::kDouble);
  const auto penalised = [](const KlForm& estimator, const KlForm& gradient) {
    PolicyObjective objective = presets::grpo(0.04);
    objective.kl.estimator = estimator;
    objective.kl.gradient = gradient;
    objective.kl.allow_biased_gradient = true;
    return objective;
  };
  const PolicyObjective own = penalised(QuarticNeverWrapped{}, QuarticNeverWrapped{});
  const at::Tensor d = (batch.ref_logps - batch.logps).detach();
  const at::Tensor w = batch.response_mask.to(at::kDouble);
  const LossOutput out = policy_loss(batch, own);
  EXPECT_NEAR(out.metrics.to_map().at("kl"), ((d.pow(4) * w).sum() / w.sum()).item<double>(),
              1e-12);
  for (const auto& [objective, name] :
       {std::pair(own, "kl_estimator"),
        std::pair(penalised(K3{}, QuarticNeverWrapped{}), "kl_gradient")}) {
    EXPECT_EQ(message<c10::ValueError>([&] { detail::policy_loss_any_device(batch, objective); }),
              std::string("policy_loss: ") + name +
                  " must be one of the library's or wrapped by on_any_device on devices other than "
                  "the CPU, got another type");
  }
  for (const KlForm& form :
       {KlForm(on_any_device(Quartic{})), KlForm(on_any_device(QuarticWithScore{}))}) {
    for (size_t i = 0; i < kKlCorrectionNames.size(); ++i) {
      PolicyObjective wrapped = penalised(form, form);
      wrapped.kl.correction = static_cast<KlCorrection>(i);
      expect_equal_paths(batch, wrapped);
    }
  }
}

TEST(PolicyLossFace, AUsersSurrogateRunsOnEveryDeviceOnceItIsWrapped) {
  const PolicyBatch batch = random_batch(3, 20, at::kDouble);
  PolicyObjective objective = presets::grpo(0.04);
  objective.surrogate = NeverWrapped{};
  const LossOutput kernel = policy_loss(batch, objective);
  EXPECT_EQ(message<c10::ValueError>([&] { detail::policy_loss_any_device(batch, objective); }),
            "policy_loss: surrogate must be one of the library's or wrapped by on_any_device on "
            "devices other than the CPU, got another type");
  objective.surrogate = on_any_device(Cubic{});
  const LossOutput tensors = detail::policy_loss_any_device(batch, objective);
  EXPECT_NEAR(kernel.loss.item<double>(), tensors.loss.item<double>(), 1e-14);
  EXPECT_LT((gradient(kernel.loss, batch.logps) - gradient(tensors.loss, batch.logps))
                .abs()
                .max()
                .item<double>(),
            1e-15);
}

TEST(PolicyLossFace, UpstreamGradientsScaleAndMix) {
  const PolicyBatch batch = random_batch(4, 9, at::kDouble);
  const at::Tensor first = ppo_loss(batch).loss, second = grpo_loss(batch).loss;
  const at::Tensor mixed = gradient(first * 3 - second * 0.5, batch.logps);
  const at::Tensor expected =
      3 * gradient(first, batch.logps) - 0.5 * gradient(second, batch.logps);
  EXPECT_LT((mixed - expected).abs().max().item<double>(), 1e-16);
}

TEST(PolicyLossFace, GradientsOfAGraphThatStaysAreTheCallers) {
  const PolicyBatch batch = random_batch(2, 9);
  const at::Tensor loss = ppo_loss(batch).loss;
  const at::Tensor first = gradient(loss, batch.logps), expected = first.clone();
  first.fill_(7);
  EXPECT_TRUE(gradient(loss, batch.logps).equal(expected));
}

TEST(PolicyLossFace, DoubleBackwardIsRefused) {
  const PolicyBatch batch = random_batch(2, 4);
  const at::Tensor once =
      torch::autograd::grad({ppo_loss(batch).loss}, {batch.logps}, {}, true, true)[0];
  EXPECT_EQ(message<c10::NotImplementedError>([&] { once.sum().backward(); }),
            "policy_loss: backward must run once, got a second derivative. The loss has none");
}

// By every way into the graph, with an upstream gradient that has a graph of its own or none.
TEST(PolicyLossFace, TokenLossesRefuseASecondDerivative) {
  const auto text =
      "policy_token_losses: backward must run once, got a second derivative. The loss has none";
  PolicyBatch batch = random_batch(2, 4);
  batch.entropies = torch::rand({2, 4}).requires_grad_();
  PolicyObjective objective = presets::reinforce();  // linear: torch would find 0
  objective.entropy.coefficient = 0.5;
  for (const at::Tensor& input : {batch.logps, batch.entropies}) {
    const at::Tensor each = policy_token_losses(batch, objective);
    for (const at::Tensor& loss : {each.sum(), each.square().sum()}) {
      const at::Tensor once = torch::autograd::grad({loss}, {input}, {}, true, true)[0];
      EXPECT_EQ(message<c10::NotImplementedError>([&] { once.sum().backward(); }), text);
      EXPECT_EQ(message<c10::NotImplementedError>(
                    [&] { torch::autograd::grad({once.sum()}, {input}, {}, true, true, true); }),
                text);
    }
  }
}

TEST(PolicyLossFace, WeightsThatLeaveMayNotBeNan) {
  PolicyBatch batch = random_batch(2, 4);
  batch.rollout_logps = batch.old_logps.clone();
  batch.rollout_logps.fill_(-std::numeric_limits<float>::infinity());
  batch.response_mask = torch::ones({2, 4});
  PolicyObjective objective = presets::ppo();
  objective.weights = {{RatioGate{}}};
  const std::string text =
      ": weights that take tokens out, ratio_gate, must be numbers, got nan at [0, 0]";
  EXPECT_EQ(message<c10::ValueError>([&] { policy_loss(batch, objective); }), "policy_loss" + text);
  EXPECT_EQ(message<c10::ValueError>([&] { policy_token_losses(batch, objective); }),
            "policy_token_losses" + text);
}

TEST(PolicyLossFace, WithoutGradTheValueIsTheSameAndNothingIsKept) {
  PolicyBatch batch = random_batch(4, 9);
  const at::Tensor with = ppo_loss(batch).loss;
  {
    torch::NoGradGuard guard;
    EXPECT_TRUE(torch::equal(ppo_loss(batch).loss, with));
  }
  batch.logps = batch.logps.detach();
  const at::Tensor without = ppo_loss(batch).loss;
  EXPECT_FALSE(without.requires_grad());
  EXPECT_TRUE(torch::equal(without, with));
  c10::InferenceMode guard;
  EXPECT_TRUE(torch::equal(ppo_loss(batch).loss, with));
}

TEST(PolicyLossFace, AbsentOldLogpsMeanOnPolicy) {
  PolicyBatch batch = random_batch(4, 9, at::kDouble);
  batch.old_logps = at::Tensor();
  const LossOutput out = ppo_loss(batch);
  const at::Tensor weight = batch.response_mask.to(at::kDouble) / batch.response_mask.sum();
  const at::Tensor expected = -batch.advantages.unsqueeze(1) * weight;
  EXPECT_LT((gradient(out.loss, batch.logps) - expected).abs().max().item<double>(), 1e-16);
  EXPECT_EQ(out.metrics.to_map().at("ratio_mean"), 1);
}

TEST(PolicyLossFace, HalfPrecisionInputsAreTheSameNumbersInFloat) {
  for (at::ScalarType dtype : {at::kBFloat16, at::kHalf}) {
    PolicyBatch narrow = random_batch(3, 50, dtype);
    PolicyBatch wide = narrow;
    for (at::Tensor* each :
         {&wide.advantages, &wide.old_logps, &wide.ref_logps, &wide.rollout_logps}) {
      *each = each->to(at::kFloat);
    }
    wide.logps = narrow.logps.detach().to(at::kFloat).requires_grad_();
    const at::Tensor loss = grpo_loss(narrow).loss, expected = grpo_loss(wide).loss;
    EXPECT_EQ(loss.scalar_type(), at::kFloat);
    EXPECT_TRUE(torch::equal(loss, expected));
    EXPECT_TRUE(
        torch::equal(gradient(loss, narrow.logps), gradient(expected, wide.logps).to(dtype)));
  }
}

TEST(PolicyLossFace, MasksMayBeIntegersOrWeights) {
  PolicyBatch batch = random_batch(3, 12);
  const at::Tensor expected = grpo_loss(batch).loss, mask = batch.response_mask;
  for (at::ScalarType dtype : {at::kByte, at::kInt, at::kLong, at::kFloat, at::kBFloat16}) {
    batch.response_mask = mask.to(dtype);
    EXPECT_TRUE(torch::equal(grpo_loss(batch).loss, expected)) << dtype;
  }
}

TEST(PolicyLossFace, TakesAnyStrides) {
  const PolicyBatch plain = random_batch(6, 10);
  const at::Tensor loss = grpo_loss(plain).loss, expected = gradient(loss, plain.logps);
  const auto transposed = [](const at::Tensor& x) { return x.detach().t().contiguous().t(); };
  const auto sliced = [](const at::Tensor& x) {
    at::Tensor big = torch::zeros({x.size(0) + 1, 2 * x.size(1) + 1}, x.options());
    at::Tensor view = big.slice(0, 1).slice(1, 1, 1 + 2 * x.size(1), 2);
    view.copy_(x.detach());
    return view;
  };
  for (const std::function<at::Tensor(const at::Tensor&)>& change :
       {std::function<at::Tensor(const at::Tensor&)>(transposed), {sliced}}) {
    PolicyBatch batch = plain;
    batch.logps = change(plain.logps).requires_grad_();
    batch.old_logps = change(plain.old_logps);
    batch.ref_logps = change(plain.ref_logps);
    batch.rollout_logps = change(plain.rollout_logps);
    batch.response_mask = change(plain.response_mask);
    batch.advantages = plain.advantages.unsqueeze(1).expand({6, 10});
    const at::Tensor out = grpo_loss(batch).loss;
    EXPECT_TRUE(torch::equal(out, loss));
    EXPECT_TRUE(torch::equal(gradient(out, batch.logps), expected));
  }
  PolicyBatch column = plain;
  column.advantages = plain.advantages.unsqueeze(1);
  EXPECT_TRUE(torch::equal(grpo_loss(column).loss, loss));
}

TEST(PolicyLossFace, BadInputGetsOneClearError) {
  const PolicyBatch good = random_batch(4, 8);
  const auto value_error = [&](auto change,
                               const PolicyObjective& objective = presets::grpo(0.04)) {
    PolicyBatch batch = good;
    change(batch);
    return message<c10::ValueError>([&] { policy_loss(batch, objective); });
  };
  const auto type_error = [&](auto change) {
    PolicyBatch batch = good;
    change(batch);
    return message<c10::TypeError>([&] { policy_loss(batch, presets::grpo(0.04)); });
  };
  using B = PolicyBatch;
  EXPECT_EQ(value_error([](B& b) { b.logps = at::Tensor(); }),
            "policy_loss: logps must be given, got none");
  EXPECT_EQ(value_error([](B& b) { b.advantages = at::Tensor(); }),
            "policy_loss: advantages must be given, got none");
  EXPECT_EQ(value_error([](B& b) { b.response_mask = at::Tensor(); }),
            "policy_loss: response_mask must be given, got none");
  EXPECT_EQ(value_error([](B& b) { b.logps = torch::zeros({4}); }),
            "policy_loss: logps must be [B, T], or [N] with offsets, got [4]");
  EXPECT_EQ(value_error([](B& b) { b.old_logps = torch::zeros({4, 7}); }),
            "policy_loss: old_logps must be [4, 8] like logps, got [4, 7]");
  EXPECT_EQ(value_error([](B& b) { b.response_mask = torch::ones({8}); }),
            "policy_loss: response_mask must be [4, 8] like logps, got [8]");
  EXPECT_EQ(value_error([](B& b) { b.advantages = torch::zeros({3}); }),
            "policy_loss: advantages must be [4] or [4, 8], got [3]");
  EXPECT_EQ(value_error([](B& b) { b.ref_logps = at::Tensor(); }),
            "policy_loss: ref_logps must be given when beta is greater than 0, got beta 0.04 and "
            "none. Pass ref_logps or beta = 0");
  EXPECT_EQ(
      value_error([](B& b) { b.old_logps = torch::zeros({4, 8}).requires_grad_(); }),
      "policy_loss: old_logps must not require grad, got a tensor that does. It is a constant "
      "of the loss: pass old_logps.detach()");
  EXPECT_EQ(value_error([](B& b) { b.response_mask = torch::full({4, 8}, -1); }),
            "policy_loss: response_mask must be in [0, 1], got -1 at [0, 0]");
  EXPECT_EQ(value_error([](B&) {}, presets::ppo({.epsilon_high = -0.1})),
            "policy_loss: epsilon_high must be at least 0, got -0.1");
  EXPECT_EQ(type_error([](B& b) { b.logps = torch::zeros({4, 8}, at::kLong); }),
            "policy_loss: logps must be float32, float64, bfloat16 or float16, got int64");
  EXPECT_EQ(type_error([](B& b) { b.logps = torch::zeros({4, 8}, at::kComplexFloat); }),
            "policy_loss: logps must be float32, float64, bfloat16 or float16, got complex64");
  EXPECT_EQ(type_error([](B& b) { b.old_logps = torch::zeros({4, 8}, at::kDouble); }),
            "policy_loss: old_logps must not be wider than logps, float32, got float64. Pass "
            "old_logps.to(torch.float32)");
  EXPECT_EQ(value_error([](B& b) { b.ref_logps = torch::zeros({4, 8}, at::device(at::kMeta)); }),
            "policy_loss: ref_logps must be on cpu like logps, got meta");

  const auto packed = [&](at::Tensor offsets) {
    return PolicyBatch{.logps = torch::zeros({8}),
                       .advantages = torch::zeros({3}),
                       .response_mask = torch::ones({8}),
                       .offsets = std::move(offsets)};
  };
  EXPECT_EQ(message<c10::TypeError>([&] { ppo_loss(packed(torch::zeros({4}))); }),
            "policy_loss: offsets must be int32 or int64, got float32");
  EXPECT_EQ(message<c10::ValueError>([&] { ppo_loss(packed(torch::tensor({0, 3, 5, 7}))); }),
            "policy_loss: offsets must run from 0 to 8, the size of logps, got 0 to 7");
  EXPECT_EQ(message<c10::ValueError>([&] { ppo_loss(packed(torch::tensor({0, 5, 3, 8}))); }),
            "policy_loss: offsets must not decrease, got 3 after 5 at [2]");
}

TEST(GroupAdvantageFace, TakesGroupsBySizeAndById) {
  const at::Tensor rewards = torch::tensor({1.0, 2.0, 6.0, 4.0, 4.0, 4.0});
  const at::Tensor by_size = group_advantage(rewards, 3);
  const at::Tensor by_id = group_advantage(rewards, torch::tensor({5, 5, 5, -1, -1, -1}));
  EXPECT_TRUE(torch::equal(by_size, by_id));
  EXPECT_NEAR(by_size[2].item<double>(), 3 / (std::sqrt(7.0) + 1e-6), 1e-6);
  EXPECT_TRUE(torch::equal(by_size.slice(0, 3), torch::zeros({3})));
  const at::Tensor narrow = torch::tensor({1.0, 1.0, 1.0, 1.0078}).to(at::kBFloat16);
  const at::Tensor wide = group_advantage(narrow.to(at::kFloat), 4);
  EXPECT_TRUE(torch::equal(group_advantage(narrow, 4), wide.to(at::kBFloat16)));
}

TEST(GroupAdvantageFace, BadInputGetsOneClearError) {
  const at::Tensor rewards = torch::ones({4});
  EXPECT_EQ(message<c10::TypeError>([&] { group_advantage(torch::ones({4}, at::kLong), 2); }),
            "group_advantage: rewards must be float32, float64, bfloat16 or float16, got int64");
  EXPECT_EQ(message<c10::ValueError>([&] { group_advantage(torch::ones({2, 2}), 2); }),
            "group_advantage: rewards must be [B], got [2, 2]");
  EXPECT_EQ(message<c10::ValueError>([&] { group_advantage(rewards, 3); }),
            "group_advantage: rewards must divide into groups of 3, got 4. Pass group ids for "
            "ragged groups");
  EXPECT_EQ(message<c10::TypeError>([&] { group_advantage(rewards, torch::ones({4})); }),
            "group_advantage: group_ids must be int32 or int64, got float32");
  EXPECT_EQ(
      message<c10::ValueError>([&] { group_advantage(rewards, torch::ones({3}, at::kLong)); }),
      "group_advantage: group_ids must be [4] like rewards, got [3]");
}

}  // namespace
}  // namespace tether
