// Vocabularies split over ranks, on the way of CUDA tensors. The ranks are calls of one process:
// the first call of each leaves its block, the second receives all.

#include <gtest/gtest.h>
#include <torch/torch.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <string>
#include <vector>

#include "libtorch/support.h"
#include "libtorch/token_logps.h"
#include "tests/libtorch/message.h"
#include "tests/libtorch_cuda/host_door.h"

namespace tether {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr int64_t kVocabulary = 40;

using Gather = std::function<at::Tensor(const at::Tensor&)>;
// What a rank has to say has been taken; the others have not spoken yet.
struct Left {};

// What run(rank, gather) gives of each.
template <class Run>
auto of_ranks(size_t count, Run run) {
  std::vector<at::Tensor> blocks;
  const Gather leave = [&](const at::Tensor& ours) -> at::Tensor {
    blocks.push_back(ours.clone());
    throw Left();
  };
  for (size_t rank = 0; rank < count; ++rank) EXPECT_THROW(run(rank, leave), Left);
  const Gather all = [&](const at::Tensor&) { return at::stack(blocks); };
  std::vector<decltype(run(0, all))> out;
  for (size_t rank = 0; rank < count; ++rank) out.push_back(run(rank, all));
  return out;
}

// The first token ignored, a column that is not there, targets at the ends of shards.
struct Rows {
  at::Tensor logits, targets;

  explicit Rows(at::ScalarType dtype) {
    torch::manual_seed(3);
    logits = (3 * torch::randn({3, 4, kVocabulary})).to(dtype);
    logits.select(-1, 7).fill_(-kInfinity);
    logits[1][1].slice(0, 13).fill_(-kInfinity);  // all that a shard has
    targets = at::tensor({-100, 0, 12, 13, 39, 1, 38, 20, 5, 30, 2, 14}).view({3, 4});
    logits[0][0] = std::nan("");
  }
};

// logps, entropies, the gradient and, asked for, the further statistics.
Results evaluated(const at::Tensor& logits, const at::Tensor& targets, TokenLogpsOptions options,
                  const Support* kept) {
  const at::Tensor x = logits.detach().clone().requires_grad_();
  options.entropies = true;
  options.row.temperature = 0.8;
  options.row.scale = 1.3;
  const TokenLogps out =
      kept ? token_logps(x, targets, options, *kept) : token_logps(x, targets, options);
  const at::Tensor upstream = torch::linspace(0.5, 2, 12).view({3, 4});
  const at::Tensor loss = (out.logps * upstream + out.entropies * (1.7 - upstream)).sum();
  Results results{out.logps.detach(), out.entropies.detach(),
                  torch::autograd::grad({loss}, {x})[0]};
  if (!options.statistics) return results;
  results.insert(results.end(),
                 {out.sum_of_squared_p, out.mean_logits, out.target_is_largest.to(at::kFloat)});
  return results;
}

void expect_whole(const Rows& rows, const std::vector<int64_t>& bounds, const Support* kept,
                  double tolerance, const std::string& name) {
  const Results want = evaluated(rows.logits, rows.targets, {.statistics = true}, kept);
  const OnCuda door;
  const auto ranks = of_ranks(bounds.size() - 1, [&](size_t rank, const Gather& gather) {
    const int64_t begin = bounds[rank], end = bounds[rank + 1];
    const TokenLogpsOptions options{
        .statistics = true, .shard = {.first_id = begin, .ids = kVocabulary, .gather = gather}};
    return evaluated(rows.logits.slice(-1, begin, end), rows.targets, options, kept);
  });
  EXPECT_EQ(door.taken(), 3 * int64_t(ranks.size()));
  std::vector<at::Tensor> slopes;
  for (const Results& each : ranks) {
    slopes.push_back(each[2]);
    Results without = each, of_whole = want;
    without[2] = of_whole[2] = at::Tensor();
    expect_same(without, of_whole, tolerance, name);
    EXPECT_TRUE(at::equal(each[0], ranks[0][0])) << name;  // the same bits on every rank
  }
  expect_same({at::cat(slopes, -1)}, {want[2]}, tolerance, name + ", gradient");
}

TEST(VocabularyShardsOnCuda, AreTheWholeOfTheCpu) {
  for (const at::ScalarType dtype : {at::kFloat, at::kBFloat16, at::kHalf}) {
    const Rows rows(dtype);
    const double tolerance = dtype == at::kFloat ? 1e-5 : 1e-2;
    for (const std::vector<int64_t>& bounds :
         {std::vector<int64_t>{0, 40}, {0, 13, 40}, {0, 1, 39, 40}}) {
      expect_whole(rows, bounds, nullptr, tolerance, std::to_string(bounds.size()));
    }
  }
}

TEST(VocabularyShardsOnCuda, OfKeptIdsAreThoseOfTheCpu) {
  const Rows rows(at::kFloat);
  at::Tensor ids = std::get<1>(torch::rand({3, 4, kVocabulary}).sort(-1)).slice(-1, 0, 5).clone();
  ids[1][2].fill_(-1);
  ids[1][1] = at::tensor({1, 2, 5, 9, 11});  // none of them in the other shard
  const Support kept = support(rows.targets, ids);
  expect_whole(rows, {0, 13, 40}, &kept, 1e-5, "kept ids");
}

TEST(VocabularyShardsOnCuda, TheGradientGoesIntoTheBuffer) {
  const Rows rows(at::kFloat);
  std::vector<at::Tensor> buffers{at::zeros({3, 4, 15}), at::zeros({3, 4, 25})};
  const OnCuda door;
  const auto ranks = of_ranks(2, [&](size_t rank, const Gather& gather) {
    const int64_t begin = rank == 0 ? 0 : 15, end = rank == 0 ? 15 : kVocabulary;
    const TokenLogpsOptions options{
        .gradient_buffer = buffers[rank],
        .shard = {.first_id = begin, .ids = kVocabulary, .gather = gather}};
    return evaluated(rows.logits.slice(-1, begin, end), rows.targets, options, nullptr);
  });
  for (size_t rank = 0; rank < 2; ++rank) {
    EXPECT_TRUE(at::equal(buffers[rank], ranks[rank][2]));
    EXPECT_GT(buffers[rank].abs().max().item<double>(), 0);
  }
}

// How the second of two ranks differs from what the first expects.
struct Second {
  std::string what;
  std::function<void(TokenLogpsOptions&, at::Tensor& targets)> change = {};
  std::function<void(at::Tensor& ids)> change_set = {};
};

TEST(VocabularyShardsOnCuda, RanksThatDoNotFitTogetherGiveNaN) {
  const Rows rows(at::kFloat);
  const at::Tensor ids = torch::arange(4).expand({3, 4, 4}).contiguous();
  const std::vector<Second> seconds{
      {"nothing"},
      {"a gap", [](auto& options, auto&) { options.shard.first_id = 17; }},
      {"an overlap", [](auto& options, auto&) { options.shard.first_id = 14; }},
      {"the first again", [](auto& options, auto&) { options.shard.first_id = 0; }},
      {"more ids", [](auto& options, auto&) { options.shard.ids = 41; }},
      {"temperature", [](auto& options, auto&) { options.row.temperature = 0.9; }},
      {"scale", [](auto& options, auto&) { options.row.scale = 1.1; }},
      {"softcap", [](auto& options, auto&) { options.row.softcap = 9; }},
      {"ignore_index", [](auto& options, auto&) { options.row.ignore_index = -99; }},
      {"further statistics", [](auto& options, auto&) { options.statistics = true; }},
      {"targets", [](auto&, at::Tensor& targets) { targets[2][3] = 15; }},
      {"swapped targets",
       [](auto&, at::Tensor& targets) {
         targets[2][3] = 2;
         targets[2][2] = 14;
       }},
      {"kept ids", {}, [](at::Tensor& set) { set[1][1][3] = 4; }}};
  for (const Second& second : seconds) {
    const OnCuda door;
    const auto ranks = of_ranks(2, [&](size_t rank, const Gather& gather) {
      const int64_t begin = rank == 0 ? 0 : 15, end = rank == 0 ? 15 : 38;
      TokenLogpsOptions options{.shard = {.first_id = begin, .ids = 38, .gather = gather}};
      at::Tensor targets = rows.targets.clamp_max(37), set = ids.clone();
      if (rank == 1 && second.change) second.change(options, targets);
      if (rank == 1 && second.change_set) second.change_set(set);
      const at::Tensor own = rows.logits.slice(-1, std::max(begin, options.shard.first_id), end);
      if (!second.change_set) return token_logps(own, targets, options).logps;
      return token_logps(own, targets, options, support(targets, set)).logps;
    });
    const at::Tensor& mine = ranks[0];
    const bool fits = !second.change && !second.change_set;
    EXPECT_EQ(mine.isnan().sum().item<int64_t>(), fits ? 0 : 11) << second.what;
    EXPECT_EQ(mine[0][0].item<double>(), 0) << second.what;
  }
}

TEST(VocabularyShardsOnCuda, AreCheckedInTheWordsOfTheCpu) {
  const at::Tensor logits = at::zeros({4, 32}), targets = at::zeros({4}, at::kLong);
  const auto said = [&](const VocabularyShard& shard, const at::Tensor& rows) {
    return message([&] { token_logps(rows, targets, {.shard = shard}); });
  };
  const auto itself = [](const at::Tensor& ours) { return ours.unsqueeze(0); };
  for (const VocabularyShard& shard :
       {VocabularyShard{.first_id = 65, .ids = 96, .gather = itself},
        VocabularyShard{.ids = 31, .gather = itself}, VocabularyShard{.first_id = 5},
        VocabularyShard{.ids = 96},
        VocabularyShard{.ids = 96, .gather = [](const at::Tensor& ours) { return ours; }},
        VocabularyShard{.ids = 96, .gather = [](const at::Tensor&) { return at::Tensor(); }}}) {
    const std::string want = said(shard, logits);
    EXPECT_NE(want, "no error");
    const OnCuda door;
    EXPECT_EQ(said(shard, logits), want);
  }
  const OnCuda door;
  EXPECT_EQ(said({.ids = 32, .gather = itself}, logits), "no error");
  EXPECT_EQ(door.taken(), 1);
}

}  // namespace
}  // namespace tether
