// Advantages and whitening on the way of CUDA tensors.

#include "libtorch/advantage.h"

#include <gtest/gtest.h>
#include <torch/torch.h>

#include <limits>
#include <string>

#include "libtorch/value_loss.h"
#include "tests/libtorch/message.h"
#include "tests/libtorch_cuda/host_door.h"

namespace tether {
namespace {

constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

AdvantageBatch tokens_of(at::ScalarType dtype) {
  torch::manual_seed(8);
  AdvantageBatch batch{.rewards = torch::randn({4, 9}).to(dtype),
                       .values = torch::randn({4, 9}).to(dtype),
                       .response_mask = torch::rand({4, 9}) > 0.3,
                       .bootstrap = torch::randn({4}),
                       .log_ratios = 0.3 * torch::randn({4, 9})};
  batch.rewards = batch.rewards.masked_fill(batch.response_mask.logical_not(), kNaN);
  return batch;
}

AdvantageBatch packed(AdvantageBatch batch, at::ScalarType index) {
  for (const auto& each : AdvantageBatch::arguments()) {
    at::Tensor& tensor = batch.*each.member;
    if (tensor.defined() && tensor.dim() == 2) tensor = tensor.flatten();
  }
  batch.offsets = at::tensor({0, 5, 5, 20, 36}, at::dtype(index));
  return batch;
}

TEST(AdvantageOnCuda, IsThatOfTheCpuForEveryRecursion) {
  for_each_recursion([&]<class Formula>(const FormulaRow<Formula>& row) {
    const Recursion recursion = row.defaults;
    const auto run = [&](AdvantageBatch batch) -> Results {
      if (row.name != "vtrace") batch.log_ratios.reset();
      if (row.name == "returns") batch.values.reset();
      const AdvantagesAndReturns out = advantage(batch, recursion);
      return {out.advantages, out.returns};
    };
    for (const at::ScalarType dtype : {at::kFloat, at::kDouble, at::kBFloat16}) {
      for (const AdvantageBatch& batch : {tokens_of(dtype), packed(tokens_of(dtype), at::kInt),
                                          packed(tokens_of(dtype), at::kLong)}) {
        expect_as_on_cpu([&] { return run(batch); }, 1, tolerance_of(dtype), std::string(row.name));
      }
    }
  });
}

TEST(AdvantageOnCuda, ByNameToo) {
  AdvantageBatch batch = tokens_of(at::kFloat);
  batch.log_ratios.reset();
  const auto run = [&]() -> Results {
    const auto gae = generalized_advantage_estimation(batch, {.gamma = 0.9, .lambda = 0.8});
    return {gae.advantages, gae.returns,
            discounted_returns({.rewards = batch.rewards, .response_mask = batch.response_mask},
                               {.gamma = 0.9})};
  };
  expect_as_on_cpu(run, 2, 2e-5, "by name");
}

TEST(GroupAdvantageOnCuda, IsThatOfTheCpuForEveryRule) {
  torch::manual_seed(9);
  at::Tensor rewards = torch::randn({12});
  rewards.slice(0, 4, 8).fill_(0.3);  // equal: exactly 0
  const at::Tensor ids = at::tensor({5, 5, 9, 9, 5, 5, 9, 9, 5, 5, 9, 9}, at::kInt);
  const at::Tensor lengths = at::arange(1, 13);
  for_each_group_rule([&]<class Formula>(const FormulaRow<Formula>& row) {
    for (const at::ScalarType dtype : {at::kFloat, at::kBFloat16}) {
      for (GroupBatch batch : {GroupBatch{.rewards = rewards.to(dtype), .group_size = 4},
                               GroupBatch{.rewards = rewards.to(dtype), .group_ids = ids}}) {
        if (row.name == "opo") batch.lengths = lengths;
        const auto run = [&]() -> Results { return {advantage(batch, GroupRule(row.defaults))}; };
        expect_as_on_cpu(run, 1, tolerance_of(dtype), std::string(row.name));
        if (batch.group_size == 0) continue;
        const OnCuda door;
        EXPECT_TRUE(at::equal(run()[0].slice(0, 4, 8), at::zeros({4}, at::dtype(dtype))));
      }
    }
  });
  const GroupAdvantage of_batch{.scale = AdvantageScale::batch_std};
  expect_as_on_cpu([&]() -> Results { return {group_advantage(rewards, 3, of_batch)}; }, 1, 2e-5,
                   "the spread of the batch");
}

TEST(WhitenOnCuda, IsThatOfTheCpu) {
  torch::manual_seed(10);
  const at::Tensor mask = torch::rand({4, 9}) > 0.3;
  for (const at::ScalarType dtype : {at::kFloat, at::kDouble, at::kBFloat16}) {
    const at::Tensor values =
        (5 + torch::randn({4, 9})).to(dtype).masked_fill(mask.logical_not(), kNaN);
    for (const Whitening& options : {Whitening{}, Whitening{.epsilon = 0.1, .shift_mean = false}}) {
      expect_as_on_cpu([&]() -> Results { return {whiten(values, mask, options)}; }, 1,
                       tolerance_of(dtype), "rows");
      expect_as_on_cpu(
          [&]() -> Results { return {whiten(values.flatten(), mask.flatten(), options)}; }, 1,
          tolerance_of(dtype), "side by side");
    }
  }
}

// A recursion of one's own: the reward is the advantage.
struct Immediate {
  double gamma = 1;
  MaskGap gap = MaskGap::carry;

  template <class Number>
  TETHER_FORMULA Step<Number> step(const RecursionToken<Number>& token) const {
    return {token.reward, Number{0}, Number{0}};
  }
};
// And a rule: it is in any group.
struct Itself {
  NanReward nan_reward = NanReward::error;

  Group::Number operator()(const Group& group, int64_t i) const { return group.reward[i]; }
};

TEST(EstimatorsOnCuda, TakeTheCpuWhereThereIsNoKernel) {
  const at::Tensor rewards = torch::randn({12}, at::kDouble);
  const AdvantageBatch tokens = packed(tokens_of(at::kFloat), at::kLong);
  const auto run = [&]() -> Results {
    return {group_advantage(rewards, 4),
            advantage(GroupBatch{.rewards = rewards.to(at::kFloat), .group_size = 4}, Itself{}),
            advantage(tokens, Immediate{}).advantages};
  };
  expect_as_on_cpu(run, 0, 0, "no kernel");
}

TEST(EstimatorsOnCuda, RefuseWithTheSentenceOfTheCpu) {
  const AdvantageBatch batch = tokens_of(at::kFloat);
  const auto expect_same_sentence = [](auto call) {
    const std::string want = message(call);
    EXPECT_NE(want, "no error");
    const OnCuda door;
    EXPECT_EQ(message(call), want);
  };
  AdvantageBatch without = batch;
  without.values.reset();
  expect_same_sentence([&] { advantage(without, Gae{}); });
  expect_same_sentence([&] { advantage(batch, Gae{.gamma = 2}); });
  expect_same_sentence([&] { group_advantage(batch.rewards.flatten(), 5); });
  expect_same_sentence([&] { group_advantage(batch.rewards.flatten(), 4, {.epsilon = -1}); });
  expect_same_sentence([&] { whiten(batch.rewards, batch.response_mask, {.epsilon = -1}); });
}

}  // namespace
}  // namespace tether
