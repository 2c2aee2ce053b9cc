#include <ATen/ATen.h>
#include <c10/util/Exception.h>
#include <gtest/gtest.h>
#include <torch/csrc/autograd/autograd.h>

#include <limits>
#include <string>
#include <vector>

#include "libtorch/token_logps.h"

// Vocabularies split over ranks, which are calls of one process here: the first call of each rank
// leaves its statistics, the second receives all.

namespace tether {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

// Both outputs and the gradient of their weighted sum.
struct Outcome {
  at::Tensor logps, entropies, sum_of_squared_p, mean_logits, target_is_largest, dlogits;
};

Outcome outcome(const at::Tensor& logits, const at::Tensor& targets, TokenLogpsOptions options) {
  options.entropies = options.statistics = true;
  const at::Tensor x = logits.detach().requires_grad_();
  const TokenLogps out = token_logps(x, targets, options);
  const at::Tensor a = at::linspace(0.5, 2, targets.numel(), at::kDouble).view_as(targets);
  const at::Tensor loss = (out.logps * a + out.entropies * (1.7 - a)).sum();
  return {out.logps.detach(), out.entropies.detach(), out.sum_of_squared_p,
          out.mean_logits,    out.target_is_largest,  torch::autograd::grad({loss}, {x})[0]};
}

// What a rank has to say has been taken; the others have not spoken yet.
struct Left {};

std::vector<Outcome> by_shards(const at::Tensor& logits, const at::Tensor& targets,
                               const TokenLogpsOptions& options,
                               const std::vector<int64_t>& bounds) {
  const auto count = bounds.size() - 1;
  std::vector<at::Tensor> statistics(count);
  std::vector<Outcome> outcomes;
  for (const bool gathered : {false, true}) {
    for (size_t rank = 0; rank < count; ++rank) {
      TokenLogpsOptions own = options;
      own.shard = {
          .first_id = bounds[rank], .ids = logits.size(-1), .gather = [&](const at::Tensor& ours) {
            if (gathered) return at::stack(statistics);
            statistics[rank] = ours.clone();
            throw Left();
          }};
      try {
        outcomes.push_back(outcome(logits.slice(-1, bounds[rank], bounds[rank + 1]), targets, own));
      } catch (const Left&) {
      }
    }
  }
  return outcomes;
}

void expect_near(const at::Tensor& got, const at::Tensor& want, double tolerance,
                 const std::string& what) {
  ASSERT_EQ(got.sizes(), want.sizes()) << what;
  EXPECT_TRUE(at::allclose(got.to(at::kDouble), want.to(at::kDouble), tolerance, tolerance))
      << what;
}

TEST(VocabularyShards, AreTheWhole) {
  at::manual_seed(4);
  const std::vector<std::vector<int64_t>> cuts = {
      {0, 5000}, {0, 2500, 5000}, {0, 1, 4999, 5000}, {0, 1000, 2000, 3000, 5000}};
  for (at::ScalarType type : {at::kFloat, at::kDouble, at::kBFloat16}) {
    for (double softcap : {0.0, 6.0}) {
      at::Tensor logits = (3 * at::randn({2, 3, 5000}, at::kDouble)).to(type);
      logits.select(-1, 17).fill_(-kInfinity);
      logits.slice(-1, 2000, 3000)[1][1].fill_(-kInfinity);  // all that one shard has
      at::Tensor targets = at::randint(5000, {2, 3}, at::kLong);
      targets[0][0] = 0;
      targets[0][1] = 4999;
      targets[1][0] = -100;
      const TokenLogpsOptions options = {.row = {.temperature = 0.8, .softcap = softcap}};
      const Outcome whole = outcome(logits, targets, options);
      for (const auto& bounds : cuts) {
        const std::vector<Outcome> shards = by_shards(logits, targets, options, bounds);
        const double tolerance = type == at::kDouble ? 1e-13 : 2e-6;
        std::vector<at::Tensor> gradients;
        for (const Outcome& each : shards) {
          expect_near(each.logps, whole.logps, tolerance, "logps");
          expect_near(each.entropies, whole.entropies, tolerance, "entropies");
          expect_near(each.sum_of_squared_p, whole.sum_of_squared_p, tolerance, "squares");
          expect_near(each.mean_logits, whole.mean_logits, tolerance, "mean");
          EXPECT_TRUE(at::equal(each.target_is_largest, whole.target_is_largest));
          EXPECT_TRUE(at::equal(each.logps, shards[0].logps));  // the same bits on every rank
          gradients.push_back(each.dlogits);
        }
        const double rounding = type == at::kBFloat16 ? 0x1p-8 : 0;
        expect_near(at::cat(gradients, -1), whole.dlogits, tolerance + rounding, "gradient");
        EXPECT_EQ(at::cat(gradients, -1).select(-1, 17).abs().max().item<double>(), 0);
      }
    }
  }
}

TEST(VocabularyShards, IgnoredRowsStayZero) {
  const at::Tensor logits = at::full({2, 8}, std::numeric_limits<double>::quiet_NaN());
  const at::Tensor targets = at::full({2}, -100, at::kLong);
  for (const Outcome& each : by_shards(logits, targets, {}, {0, 3, 8})) {
    EXPECT_EQ(each.logps.abs().max().item<float>(), 0);
    EXPECT_EQ(each.entropies.abs().max().item<float>(), 0);
    EXPECT_EQ(each.dlogits.abs().max().item<double>(), 0);
  }
}

TEST(VocabularyShards, GradientOfAShardGoesIntoTheBuffer) {
  at::manual_seed(5);
  const at::Tensor logits = at::randn({4, 300}), targets = at::randint(300, {4}, at::kLong);
  const at::Tensor want = by_shards(logits, targets, {}, {0, 100, 300})[1].dlogits;
  const at::Tensor buffer = at::zeros({4, 200});
  TokenLogpsOptions options{.gradient_buffer = buffer};
  // The buffer has the size of the second shard.
  std::vector<at::Tensor> statistics(2);
  for (const bool gathered : {false, true}) {
    for (size_t rank : {size_t{0}, size_t{1}}) {
      const int64_t begin = rank == 0 ? 0 : 100, end = rank == 0 ? 100 : 300;
      options.gradient_buffer = rank == 1 ? buffer : at::Tensor();
      options.shard = {.first_id = begin, .ids = 300, .gather = [&](const at::Tensor& ours) {
                         if (gathered) return at::stack(statistics);
                         statistics[rank] = ours.clone();
                         throw Left();
                       }};
      try {
        outcome(logits.slice(-1, begin, end), targets, options);
      } catch (const Left&) {
      }
    }
  }
  EXPECT_TRUE(at::equal(buffer, want));
}

TEST(VocabularyShards, AreChecked) {
  const at::Tensor logits = at::zeros({4, 32}), targets = at::zeros({4}, at::kLong);
  const auto refusal = [&](const VocabularyShard& shard, int64_t target = 0) -> std::string {
    try {
      token_logps(logits, targets + target, {.shard = shard});
    } catch (const c10::Error& error) {
      return error.what_without_backtrace();
    }
    return "no error";
  };
  const auto itself = [](const at::Tensor& ours) { return ours.unsqueeze(0); };
  EXPECT_EQ(refusal({.first_id = 0, .ids = 32, .gather = itself}, 31), "no error");
  EXPECT_EQ(
      refusal({.first_id = 64, .ids = 96, .gather = itself}, 95),
      "token_logps: shards must hold every id of [0, 96), got none before [64, 96) of rank 0");
  const auto twice = [](const at::Tensor& ours) { return at::stack({ours, ours}); };
  EXPECT_EQ(refusal({.first_id = 0, .ids = 64, .gather = twice}),
            "token_logps: shards must not overlap, got [0, 32) of rank 0 and [0, 32) of rank 1");
  const auto other = [](const at::Tensor& ours) {
    const at::Tensor theirs = ours.clone();
    theirs[0][4] = 0.5;  // their temperature
    return at::stack({ours, theirs});
  };
  EXPECT_EQ(refusal({.first_id = 0, .ids = 64, .gather = other}),
            "token_logps: shards must all have the same temperature, got 1 of rank 0 and 0.5 of "
            "rank 1");
  const auto of_other_targets = [](const at::Tensor& ours) {
    const at::Tensor theirs = ours.clone();
    theirs[0][7] = 1;  // the hash of their targets
    return at::stack({ours, theirs});
  };
  EXPECT_EQ(
      refusal({.first_id = 0, .ids = 64, .gather = of_other_targets}),
      "token_logps: shards must all have the same targets, ignore_index and support, got those of "
      "rank 0 and others of rank 1");
  EXPECT_EQ(refusal({.first_id = 65, .ids = 96, .gather = itself}),
            "token_logps: shard.first_id must be in [0, 64], got 65");
  EXPECT_EQ(refusal({.first_id = -1, .ids = 96, .gather = itself}),
            "token_logps: shard.first_id must be in [0, 64], got -1");
  EXPECT_EQ(refusal({.ids = 31, .gather = itself}),
            "token_logps: shard.ids must be at least 32 like logits [4, 32], got 31");
  EXPECT_EQ(refusal({.first_id = 5}),
            "token_logps: shard.ids must be given with first_id or gather, got 0");
  EXPECT_EQ(refusal({.gather = itself}),
            "token_logps: shard.ids must be given with first_id or gather, got 0");
  EXPECT_EQ(refusal({.ids = 96}), "token_logps: shard.gather must be given, got none");
  EXPECT_EQ(refusal({.ids = 96, .gather = itself}, 96),
            "token_logps: targets must be in [0, 96) or ignore_index -100, got 96 at [0]");
  EXPECT_EQ(refusal({.ids = 96, .gather = [](const at::Tensor& ours) { return ours; }}),
            "token_logps: shard.gather must return float64 [shards, 5, 8] on cpu, got float64 "
            "[5, 8] on cpu");
  EXPECT_EQ(refusal({.ids = 96, .gather = [](const at::Tensor&) { return at::Tensor(); }}),
            "token_logps: shard.gather must return a tensor, got none");
}

}  // namespace
}  // namespace tether
