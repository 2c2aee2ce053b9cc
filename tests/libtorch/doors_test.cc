// What every function of the LibTorch face asks of its tensors beyond its own rules: one device,
// offsets in order, types that the loops take; and what torch may do around a call.

#include <ATen/ATen.h>
#include <ATen/autocast_mode.h>
#include <c10/core/InferenceMode.h>
#include <gtest/gtest.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/forward_grad.h>

#include <functional>
#include <limits>
#include <string>
#include <vector>

#include "libtorch/tether.h"
#include "rl/catalogue.h"
#include "tests/libtorch/message.h"

namespace tether {
namespace {

const double kInfinity = std::numeric_limits<double>::infinity();

at::Tensor packed(int64_t size) { return at::linspace(-2, -1, size, at::kDouble); }

// call(offsets) of every function of packed rows, here six tokens.
std::vector<std::function<void(const at::Tensor&)>> packed_calls() {
  const at::Tensor six = packed(6), mask = at::ones({6});
  return {
      [=](const at::Tensor& o) {
        policy_loss({.logps = six, .advantages = six, .response_mask = mask, .offsets = o},
                    presets::ppo());
      },
      [=](const at::Tensor& o) {
        detail::policy_loss_any_device(
            {.logps = six, .advantages = six, .response_mask = mask, .offsets = o}, presets::ppo(),
            {});
      },
      [=](const at::Tensor& o) {
        policy_token_losses({.logps = six, .advantages = six, .response_mask = mask, .offsets = o},
                            presets::ppo());
      },
      [=](const at::Tensor& o) {
        local_counts({.logps = six, .advantages = six, .response_mask = mask, .offsets = o},
                     presets::ppo());
      },
      [=](const at::Tensor& o) {
        preference_loss({.logps = six, .ref_logps = six, .response_mask = mask, .offsets = o},
                        presets::dpo());
      },
      [=](const at::Tensor& o) {
        detail::preference_loss_any_device(
            {.logps = six, .ref_logps = six, .response_mask = mask, .offsets = o}, presets::dpo(),
            {});
      },
      [=](const at::Tensor& o) {
        value_loss({.values = six, .returns = six, .response_mask = mask, .offsets = o});
      },
      [=](const at::Tensor& o) {
        generalized_advantage_estimation(
            {.rewards = six, .values = six, .response_mask = mask, .offsets = o});
      },
      [=](const at::Tensor& o) {
        discounted_returns({.rewards = six, .response_mask = mask, .offsets = o});
      },
      [=](const at::Tensor& o) { kl_report(six, mask, {}, o); },
      [=](const at::Tensor& o) { mismatch_report(six, six, mask, o); },
      [=](const at::Tensor& o) {
        batch_weights({.logps = six, .response_mask = mask, .entropies = six, .offsets = o},
                      TopEntropy{});
      },
  };
}

TEST(Doors, OffsetsRunFrom0ToNInOrder) {
  const int64_t largest = std::numeric_limits<int64_t>::max();
  const auto ids = [](std::vector<int64_t> values) { return at::tensor(values); };
  for (const auto& call : packed_calls()) {
    EXPECT_EQ(message([&] { call(ids({0, 3, 6})); }), "no error");
    const auto ends_with = [&](const at::Tensor& offsets, const std::string& rule) {
      const std::string said = message([&] { call(offsets); });
      EXPECT_EQ(said.substr(said.find(": ") + 2), "offsets must " + rule);
    };
    const auto runs = [&](const std::string& got) {
      const std::string said = message([&] { call(ids({2, 5, 8})); });
      EXPECT_NE(said.find("offsets must run from 0 to 6, the size of "), std::string::npos) << said;
      EXPECT_NE(said.find(", got " + got), std::string::npos) << said;
    };
    runs("2 to 8");
    ends_with(ids({0, largest, -5, 6}), "not decrease, got -5 after " + text(largest) + " at [2]");
    ends_with(ids({0, 9, 6}), "not decrease, got 6 after 9 at [2]");
    ends_with(ids({0, 9, 6}).to(at::kInt), "not decrease, got 6 after 9 at [2]");
  }
}

// Every tensor of every function, one at a time on "meta".
TEST(Doors, EveryArgumentIsOnTheDeviceOfTheFirst) {
  const at::Tensor rows = packed(8).view({2, 4}), mask = at::ones({2, 4}), row = packed(2);
  const at::Tensor meta_rows = rows.to(at::kMeta), meta_row = row.to(at::kMeta);
  const at::Tensor offsets = at::tensor({0, 4, 8}).to(at::kMeta), flat = packed(8);
  const auto expect = [](const std::string& name, const std::string& like,
                         const std::function<void()>& call) {
    const std::string said = message(call);
    EXPECT_EQ(said.substr(said.find(": ") + 2),
              name + " must be on cpu like " + like + ", got meta");
  };
  const PolicyBatch policy{.logps = rows,
                           .advantages = rows,
                           .response_mask = mask,
                           .old_logps = rows,
                           .ref_logps = rows,
                           .entropies = rows};
  const std::vector<std::pair<std::string, at::Tensor PolicyBatch::*>> members{
      {"advantages", &PolicyBatch::advantages},
      {"response_mask", &PolicyBatch::response_mask},
      {"old_logps", &PolicyBatch::old_logps},
      {"ref_logps", &PolicyBatch::ref_logps},
      {"entropies", &PolicyBatch::entropies},
      {"rollout_logps", &PolicyBatch::rollout_logps},
      {"token_weights", &PolicyBatch::token_weights},
      {"kl_weights", &PolicyBatch::kl_weights},
      {"entropy_weights", &PolicyBatch::entropy_weights},
  };
  for (const auto& [name, member] : members) {
    PolicyBatch batch = policy;
    batch.*member = meta_rows;
    expect(name, "logps", [&] { policy_loss(batch, presets::ppo()); });
    expect(name, "logps", [&] { policy_token_losses(batch, presets::ppo()); });
    expect(name, "logps", [&] { local_counts(batch, presets::ppo()); });
  }
  expect("offsets", "logps", [&] {
    policy_loss({.logps = flat, .advantages = flat, .response_mask = flat, .offsets = offsets},
                presets::ppo());
  });
  expect("ref_logps", "logps", [&] {
    preference_loss({.logps = rows, .ref_logps = meta_rows, .response_mask = mask}, presets::dpo());
  });
  expect("response_mask", "logps", [&] {
    preference_loss({.logps = rows, .ref_logps = rows, .response_mask = meta_rows}, presets::dpo());
  });

  ValueBatch values{.values = rows, .returns = rows, .response_mask = mask, .old_values = rows};
  const auto value_member = [&](const char* name, at::Tensor ValueBatch::* member) {
    ValueBatch batch = values;
    batch.*member = meta_rows;
    expect(name, "values", [&] { value_loss(batch); });
  };
  value_member("returns", &ValueBatch::returns);
  value_member("response_mask", &ValueBatch::response_mask);
  value_member("old_values", &ValueBatch::old_values);
  expect("response_mask", "values", [&] { whiten(rows, meta_rows); });
  expect("response_mask", "log_ratios", [&] { kl_report(rows, meta_rows); });
  expect("rollout_logps", "old_logps", [&] { mismatch_report(rows, meta_rows, mask); });
  expect("entropies", "logps", [&] {
    batch_weights({.logps = rows, .response_mask = mask, .entropies = meta_rows}, TopEntropy{});
  });

  const GaeBatch gae{.rewards = rows,
                     .values = rows,
                     .response_mask = mask,
                     .bootstrap = row,
                     .done = mask.to(at::kBool),
                     .truncated = mask.to(at::kBool),
                     .truncation_values = rows,
                     .lambdas = row};
  const auto gae_member = [&](const char* name, at::Tensor GaeBatch::* member,
                              const at::Tensor& meta) {
    GaeBatch batch = gae;
    batch.*member = meta;
    expect(name, "rewards", [&] { generalized_advantage_estimation(batch); });
  };
  gae_member("values", &GaeBatch::values, meta_rows);
  gae_member("response_mask", &GaeBatch::response_mask, meta_rows);
  gae_member("bootstrap", &GaeBatch::bootstrap, meta_row);
  gae_member("done", &GaeBatch::done, meta_rows.to(at::kBool));
  gae_member("truncated", &GaeBatch::truncated, meta_rows.to(at::kBool));
  gae_member("truncation_values", &GaeBatch::truncation_values, meta_rows);
  gae_member("lambdas", &GaeBatch::lambdas, meta_row);
  gae_member("lambdas", &GaeBatch::lambdas, meta_rows);
  expect("response_mask", "rewards",
         [&] { discounted_returns({.rewards = rows, .response_mask = meta_rows}); });
  expect("bootstrap", "rewards", [&] {
    discounted_returns({.rewards = rows, .response_mask = mask, .bootstrap = meta_row});
  });
  expect("group_ids", "rewards",
         [&] { group_advantage(row, at::tensor({0, 0}, at::kLong).to(at::kMeta)); });
}

TEST(Doors, MasksMayBeIntegersEverywhere) {
  const at::Tensor rows = packed(8).view({2, 4});
  const at::Tensor floats = at::tensor({1., 1., 0., 1., 1., 0., 0., 1.}).view({2, 4});
  for (const at::ScalarType type : {at::kBool, at::kByte, at::kInt, at::kLong}) {
    const at::Tensor mask = floats.to(type);
    EXPECT_TRUE(at::equal(whiten(rows, mask), whiten(rows, floats)));
    EXPECT_EQ(kl_report(rows, mask).mean, kl_report(rows, floats).mean);
    EXPECT_EQ(mismatch_report(rows, 2 * rows, mask).k3, mismatch_report(rows, 2 * rows, floats).k3);
    const auto picks = [&](const at::Tensor& weights) {
      return batch_weights({.logps = rows, .response_mask = weights, .entropies = rows},
                           TopEntropy{.share = 0.5});
    };
    EXPECT_TRUE(at::equal(picks(mask), picks(floats)));
    const auto loss = [&](const at::Tensor& weights) {
      return value_loss({.values = rows, .returns = rows + 1, .response_mask = weights}).loss;
    };
    EXPECT_TRUE(at::equal(loss(mask), loss(floats)));
    const auto returns = [&](const at::Tensor& weights) {
      return discounted_returns({.rewards = rows, .response_mask = weights});
    };
    EXPECT_TRUE(at::equal(returns(mask), returns(floats)));
  }
  EXPECT_EQ(message([&] { whiten(rows, floats.to(at::kComplexFloat)); }),
            "whiten: response_mask must be float32, float64, bfloat16 or float16, got complex64");
}

TEST(Doors, AnInfiniteUpstreamGradientLeavesZerosAlone) {
  const at::Tensor logps = at::tensor({-1., -1., -1.}).view({1, 3}).requires_grad_();
  const PolicyBatch batch{
      .logps = logps,
      .advantages = at::ones({1}),
      .response_mask = at::tensor({1., 1., 0.}).view({1, 3}),
      .old_logps = at::tensor({-2., -1., -1.}).view({1, 3})};  // the first clipped
  for (const double upstream : {kInfinity, double(NAN)}) {
    const at::Tensor loss = ppo_loss(batch).loss;
    const at::Tensor found =
        torch::autograd::grad({loss}, {logps}, {at::full({}, upstream, loss.options())})[0];
    EXPECT_EQ(found[0][0].item<double>(), 0);
    EXPECT_FALSE(std::isfinite(found[0][1].item<double>()));
    EXPECT_EQ(found[0][2].item<double>(), 0);
  }
}

TEST(Doors, TensorsOfInferenceModeAreConstantsLikeOthers) {
  const at::Tensor logits = at::randn({3, 7}).requires_grad_(), hidden = at::randn({3, 5});
  const at::Tensor weight = at::randn({7, 5}).requires_grad_();
  at::Tensor targets, ids, head, logps, other, mask;
  {
    const c10::InferenceMode inference;
    targets = at::tensor({0, 3, 6}, at::kLong);
    ids = at::tensor({0, 1, 2, 3, 4, 5}, at::kLong).view({3, 2});
    logps = at::full({3}, -1.0);
    head = at::full({3, 2}, -1.0);
    other = at::zeros({3, 7});
    mask = at::ones({3}, at::kBool);
  }
  token_logps(logits, targets).logps.sum().backward();
  linear_token_logps(hidden, {weight}, targets).logps.sum().backward();
  categorical_kl(logits, other, {.mask = mask}).kl.sum().backward();
  top_k_kl(logits, {ids, head, targets, logps}).sum().backward();
  const at::Tensor policy = at::full({1, 3}, -1.0).requires_grad_();
  policy_loss({.logps = policy,
               .advantages = logps.slice(0, 0, 1),
               .response_mask = mask.view({1, 3}),
               .old_logps = logps.view({1, 3}),
               .entropies = logps.view({1, 3})},
              presets::ppo())
      .loss.backward();
  EXPECT_TRUE(logits.grad().defined() && weight.grad().defined() && policy.grad().defined());
}

TEST(Doors, ABufferOfTwoCallsIsRefused) {
  const at::Tensor first = at::randn({3, 7}).requires_grad_();
  const at::Tensor second = at::randn({3, 7}).requires_grad_();
  const at::Tensor targets = at::tensor({0, 3, 6}, at::kLong), buffer = at::empty({3, 7});
  const TokenLogpsOptions options{.gradient_buffer = buffer};
  const at::Tensor a = token_logps(first, targets, options).logps.sum();
  const at::Tensor b = token_logps(second, targets, options).logps.sum();
  b.backward();
  EXPECT_EQ(message([&] { a.backward(); }),
            "token_logps: gradient_buffer must be used for nothing else until backward, got one "
            "that has changed. Give each call a buffer of its own");
}

TEST(Doors, HiddenStatesAndHeadOfTwoTypesMeetInTheWider) {
  const at::Tensor hidden = at::randn({4, 6}).to(at::kBFloat16).requires_grad_();
  const at::Tensor weight = at::randn({9, 6}).requires_grad_();
  const at::Tensor targets = at::tensor({1, 2, -100, 8}, at::kLong);
  const at::Tensor mixed = linear_token_logps(hidden, {weight}, targets).logps;
  EXPECT_TRUE(at::equal(mixed, linear_token_logps(hidden.to(at::kFloat), {weight}, targets).logps));
  mixed.sum().backward();
  EXPECT_EQ(hidden.grad().scalar_type(), at::kBFloat16);
  EXPECT_EQ(weight.grad().scalar_type(), at::kFloat);
}

TEST(Doors, UnderAutocastTheHeadIsInItsType) {
  const at::Tensor hidden = at::randn({4, 6}).requires_grad_();
  const at::Tensor weight = at::randn({9, 6}).requires_grad_();
  const at::Tensor targets = at::tensor({1, 2, -100, 8}, at::kLong);
  const auto in_halves = [&](const at::Tensor& tensor) { return tensor.to(at::kBFloat16); };
  const LinearOptions chunks{.chunk_bytes = 9 * 2 * 2};  // two rows
  const at::Tensor expected =
      linear_token_logps(in_halves(hidden), {in_halves(weight)}, targets, chunks).logps;
  const auto want = torch::autograd::grad({expected.sum()}, {hidden, weight});
  at::autocast::set_autocast_enabled(at::kCPU, true);
  const at::Tensor found = linear_token_logps(hidden, {weight}, targets, chunks).logps;
  const auto got = torch::autograd::grad({found.sum()}, {hidden, weight});
  at::autocast::set_autocast_enabled(at::kCPU, false);
  EXPECT_TRUE(at::equal(found, expected));
  for (size_t i = 0; i < 2; ++i) EXPECT_TRUE(at::equal(got[i], want[i])) << i;
}

TEST(Doors, TangentsAreRefusedOfConstantsToo) {
  const auto level = torch::autograd::ForwardADLevel::get_next_idx();
  const at::Tensor rows = packed(8).view({2, 4}), mask = at::ones({2, 4});
  const at::Tensor dual = at::_make_dual(rows, at::ones_like(rows), static_cast<int64_t>(level));
  const std::string rule =
      " must have no tangent, got one. Forward-mode derivatives are not supported: use backward";
  PolicyBatch batch{.logps = rows, .advantages = rows, .response_mask = mask};
  batch.advantages = dual;
  EXPECT_EQ(message([&] { ppo_loss(batch); }), "policy_loss: advantages" + rule);
  batch.advantages = rows;
  batch.logps = dual;
  EXPECT_EQ(message([&] { ppo_loss(batch); }), "policy_loss: logps" + rule);
  EXPECT_EQ(message([&] { whiten(dual, mask); }), "whiten: values" + rule);
  EXPECT_EQ(message([&] { kl_report(dual, mask); }), "kl_report: log_ratios" + rule);
  EXPECT_EQ(message([&] { token_logps(dual, at::zeros({2}, at::kLong)); }),
            "token_logps: logits" + rule);
  torch::autograd::ForwardADLevel::release_idx(level);
}

TEST(Doors, NestedTensorsAreRefused) {
  const at::Tensor rows = packed(8).view({2, 4}), mask = at::ones({2, 4});
  const at::Tensor nested = at::_nested_tensor_from_tensor_list({packed(4), packed(4)});
  const std::string rule = " must be a dense tensor, got a nested one";
  PolicyBatch batch{.logps = rows, .advantages = rows, .response_mask = mask};
  batch.advantages = nested;
  EXPECT_EQ(message([&] { ppo_loss(batch); }), "policy_loss: advantages" + rule);
  batch = {.logps = nested, .advantages = rows, .response_mask = mask};
  EXPECT_EQ(message([&] { ppo_loss(batch); }), "policy_loss: logps" + rule);
  EXPECT_EQ(message([&] { token_logps(nested, at::zeros({2}, at::kLong)); }),
            "token_logps: logits" + rule);
}

TEST(Doors, LogitsThatOverflowOverTheTemperatureKeepTheirGradient) {
  const at::Tensor logits =
      at::tensor({3e38f, 1.f, 3e38f, -3e38f, -3e38f, -3e38f}).view({2, 3}).requires_grad_();
  const at::Tensor targets = at::tensor({0, 1}, at::kLong);
  const at::Tensor slopes = at::tensor({1.f, 0.f, -1.f, -2.f / 3, 4.f / 3, -2.f / 3}).view({2, 3});
  for (const RowOptions& row : {RowOptions{.temperature = 0.5}, RowOptions{.scale = 2}}) {
    const TokenLogpsOptions options{.row = row, .entropies = true, .statistics = true};
    const TokenLogps kernel = token_logps(logits, targets, options);
    const TokenLogps tensors = detail::token_logps_any_device(logits, targets, options);
    for (const TokenLogps& each : {kernel, tensors}) {
      EXPECT_TRUE(at::allclose(each.logps, -each.entropies));
      EXPECT_TRUE(at::allclose(each.entropies, at::tensor({2.f, 3.f}).log()));
      EXPECT_TRUE(
          at::allclose(torch::autograd::grad({each.logps}, {logits}, {at::ones({2})})[0], slopes));
      EXPECT_TRUE(each.target_is_largest.all().item<bool>());
    }
  }
}

TEST(Doors, NoTargetIsTheLargestOfARowWithNaN) {
  at::Tensor logits = at::zeros({9, 9});
  logits.fill_diagonal_(NAN);  // of each row another column
  const at::Tensor targets = at::arange(9).roll(1);
  const TokenLogpsOptions options{.statistics = true};
  for (const TokenLogps& each : {token_logps(logits, targets, options),
                                 detail::token_logps_any_device(logits, targets, options)}) {
    EXPECT_FALSE(each.target_is_largest.any().item<bool>());
  }
}

// 1 - tanh^2 of 10 and 9 is below the last place of 1.
TEST(Doors, TheSlopeOfASoftcapKeepsItsDigits) {
  const at::Tensor values = at::tensor({300.0, 270.0, -300.0}, at::kDouble).view({1, 3});
  const at::Tensor z = values / 30, p = at::softmax(30 * at::tanh(z), -1);
  at::Tensor expected = -p;
  expected[0][0] = p[0][1] + p[0][2];
  expected = expected / at::cosh(z).square();
  for (const at::ScalarType type : {at::kFloat, at::kDouble}) {
    for (const auto call : {token_logps, detail::token_logps_any_device}) {
      const at::Tensor logits = values.detach().clone().to(type).requires_grad_();
      call(logits, at::zeros({1}, at::kLong), {.row = {.softcap = 30}}).logps.sum().backward();
      const at::Tensor error = (logits.grad().to(at::kDouble) - expected).abs() / expected.abs();
      EXPECT_LT(error.max().item<double>(), type == at::kDouble ? 1e-12 : 1e-5) << error;
    }
  }
}

TEST(Doors, IgnoredRowsMayHoldNaNUnderASoftcapOnAnyDevice) {
  at::Tensor values = at::randn({2, 5});
  values[1].fill_(NAN);
  const at::Tensor logits = values.requires_grad_();
  const at::Tensor targets = at::tensor({1, -100}, at::kLong);
  const TokenLogps out =
      detail::token_logps_any_device(logits, targets, {.row = {.softcap = 5}, .entropies = true});
  (out.logps.sum() + out.entropies.sum()).backward();
  EXPECT_TRUE(logits.grad().isfinite().all().item<bool>());
}

}  // namespace
}  // namespace tether
