#include "libtorch/evaluators.h"

#include <gtest/gtest.h>
#include <torch/torch.h>

#include <atomic>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "libtorch/policy_loss.h"
#include "libtorch/preference_loss.h"
#include "tests/libtorch/user_library/formulas.h"

namespace user {
namespace {

// Called as the two of the library, but never registered.
struct Own {
  template <class Number, class Constant>
  TETHER_FORMULA Number operator()(const tether::Token<Number, Constant>& token) const {
    return token.advantage * token.logp;
  }
};

}  // namespace
}  // namespace user

namespace tether {
namespace {

PolicyBatch policy_batch() {
  torch::manual_seed(11);
  const at::Tensor logps = -torch::rand({3, 8}, at::kDouble);
  return {.logps = logps.clone().requires_grad_(),
          .advantages = torch::randn({3}, at::kDouble),
          .response_mask = torch::ones({3, 8}),
          .old_logps = logps + 0.3 * torch::randn({3, 8}, at::kDouble)};
}

PolicyObjective objective_of(const Surrogate& surrogate) {
  PolicyObjective objective = presets::ppo();
  objective.surrogate = surrogate;
  return objective;
}

template <class Output>
void expect_equal(const Output& tensors, const Output& kernel, const at::Tensor& logps) {
  const auto gradient = [&](const Output& out) {
    return torch::autograd::grad({out.loss}, {logps})[0];
  };
  EXPECT_NEAR(tensors.loss.template item<double>(), kernel.loss.template item<double>(), 1e-14);
  EXPECT_LT((gradient(tensors) - gradient(kernel)).abs().max().template item<double>(), 1e-15);
}

void expect_as_the_kernel(const Surrogate& surrogate) {
  const PolicyBatch batch = policy_batch();
  const PolicyObjective objective = objective_of(surrogate);
  expect_equal(detail::policy_loss_any_device(batch, objective), policy_loss(batch, objective),
               batch.logps);
}

template <class Call>
std::string message(Call call) {
  try {
    call();
  } catch (const c10::ValueError& error) {
    return error.msg();
  }
  return "no error";
}

constexpr std::string_view kUnknown =
    " must be one of the library's or wrapped by on_any_device on devices other than the CPU, got "
    "another type";

TEST(Evaluators, FormulasOfOneNameInTwoFilesAreTwo) {
  const Surrogate first = user::first_own(), second = user::second_own();
  ASSERT_STREQ(first.type().name(), second.type().name());
  ASSERT_STREQ(first.type().name(), typeid(user::Own).name());
  expect_as_the_kernel(first);
  expect_as_the_kernel(second);
}

TEST(Evaluators, AFormulaIsUnknownAlthoughOthersOfItsNameAreKnown) {
  user::first_own();
  EXPECT_EQ(
      message([] { detail::policy_loss_any_device(policy_batch(), objective_of(user::Own{})); }),
      std::string("policy_loss: surrogate").append(kUnknown));
}

TEST(Evaluators, ATypeIsTheSameInALibraryWithHiddenVisibility) {
  user::register_shared();
  expect_as_the_kernel(user::Shared{.strength = 0.7});
}

TEST(Evaluators, APairLossOfAnotherLibrary) {
  const at::Tensor logps = -torch::rand({6}, at::kDouble);
  const PreferenceBatch batch{.logps = logps.requires_grad_(),
                              .ref_logps = -torch::rand({6}, at::kDouble)};
  PreferenceObjective objective = presets::dpo();
  objective.loss = user::own_pair_loss();
  expect_equal(detail::preference_loss_any_device(batch, objective),
               preference_loss(batch, objective), batch.logps);
}

// A surrogate whose loss is its number.
template <int number>
struct Numbered {
  template <class Number, class Constant>
  TETHER_FORMULA Number operator()(const Token<Number, Constant>& token) const {
    return token.logp * 0 + number;
  }
};

TEST(Evaluators, ThreadsRegisterAndEvaluate) {
  const TensorNumber zeros{torch::zeros({1}, at::kDouble)};
  const TensorToken token{zeros, zeros, zeros, zeros, zeros, zeros};
  std::atomic<int> wrong = 0;
  const auto each = [&]<int number>(std::integral_constant<int, number>) {
    const at::Tensor loss = detail::on_tensors(on_any_device(Numbered<number>{}), token);
    const at::Tensor known = detail::on_tensors(Reinforce{}, token);
    wrong += loss.item<double>() != number || known.item<double>() != 0;
  };
  std::vector<std::thread> threads;
  for (int i = 0; i < 4; ++i) {
    threads.emplace_back([&] {
      [&]<int... number>(std::integer_sequence<int, number...>) {
        (each(std::integral_constant<int, number>()), ...);
      }(std::make_integer_sequence<int, 64>());
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(wrong, 0);
}

}  // namespace
}  // namespace tether
