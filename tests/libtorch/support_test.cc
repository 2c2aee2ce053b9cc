#include "libtorch/support.h"

#include <ATen/ATen.h>
#include <gtest/gtest.h>
#include <torch/csrc/autograd/autograd.h>

#include <cmath>
#include <limits>
#include <string>
#include <vector>

#include "libtorch/linear_token_logps.h"
#include "libtorch/token_logps.h"

namespace tether {
namespace {

template <class Call>
std::string message(Call call) {
  try {
    call();
  } catch (const c10::Error& error) {
    return error.what_without_backtrace();
  }
  return "no error";
}

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr int64_t kVocabulary = 1024, kWidth = 6;

// Tokens of K ids, the first without any, the second with two, the third ignored.
struct Sets {
  at::Tensor targets, ids;
};
Sets random_sets(int64_t size) {
  Sets out{at::randint(kVocabulary, {2, 4}, at::kLong),
           std::get<1>(at::rand({2, 4, kVocabulary}).sort(-1)).slice(-1, 0, size).clone()};
  out.ids[0][0].fill_(-1);
  out.ids[0][1].slice(0, 2).fill_(-1);
  out.targets[0][2] = -100;
  out.targets[1] = out.ids[1].select(-1, 1);
  return out;
}

// -inf outside of the set of each token, to which its target belongs.
at::Tensor without_others(const at::Tensor& logits, const Sets& sets) {
  at::Tensor absent = at::ones(logits.sizes(), at::kBool);
  for (int64_t i = 0; i < sets.targets.numel(); ++i) {
    const at::Tensor ids = sets.ids.view({-1, sets.ids.size(-1)})[i];
    const at::Tensor kept = ids.index({ids >= 0}), row = absent.view({-1, kVocabulary})[i];
    const auto target = sets.targets.view({-1})[i].item<int64_t>();
    row.index_fill_(0, kept, false);
    if (target >= 0) row[target] = false;
    if (kept.numel() == 0) row.fill_(false);
  }
  return logits.masked_fill(absent, -kInfinity);
}

at::Tensor leaf(at::IntArrayRef sizes) { return at::randn(sizes, at::kDouble).requires_grad_(); }

std::vector<at::Tensor> gradients(const TokenLogps& out, const std::vector<at::Tensor>& leaves) {
  const at::Tensor a = at::linspace(0.5, 2, out.logps.numel(), at::kDouble).view_as(out.logps);
  return torch::autograd::grad({(out.logps * a + out.entropies * (1.7 - a)).sum()}, leaves);
}

void expect_close(const at::Tensor& got, const at::Tensor& want, const std::string& what) {
  EXPECT_LE((got - want).abs().max().item<double>(), 1e-13) << what;
}

const TokenLogpsOptions kOptions{.row = {.temperature = 0.7, .softcap = 5}, .entropies = true};
const LinearOptions kLinearOptions{.row = kOptions.row, .entropies = true};

TEST(Support, LogitsEqualThoseWithTheOtherColumnsAway) {
  const Sets sets = random_sets(5);
  const at::Tensor logits = leaf({2, 4, kVocabulary});
  const TokenLogps out =
      token_logps(logits, sets.targets, kOptions, support(sets.targets, sets.ids));
  const TokenLogps want = token_logps(without_others(logits, sets), sets.targets, kOptions);
  expect_close(out.logps, want.logps, "logps");
  expect_close(out.entropies, want.entropies, "entropies");
  expect_close(gradients(out, {logits})[0], gradients(want, {logits})[0], "gradient");
}

// Sets of 4 are multiplied by their rows of the head, of 16 by chunks of logits.
TEST(Support, HiddenStatesEqualTheirLogits) {
  for (const int64_t size : {4, 16}) {
    for (const int64_t chunk_bytes : {int64_t{1}, int64_t{1} << 20}) {
      for (const bool with_bias : {true, false}) {
        const std::string what = std::to_string(size) + " " + std::to_string(chunk_bytes);
        const Sets sets = random_sets(size);
        const at::Tensor hidden = leaf({2, 4, kWidth}), weight = leaf({kVocabulary, kWidth});
        const at::Tensor bias = with_bias ? leaf({kVocabulary}) : at::Tensor();
        LinearOptions options = kLinearOptions;
        options.chunk_bytes = chunk_bytes;
        const TokenLogps out = linear_token_logps(hidden, {weight, bias}, sets.targets, options,
                                                  support(sets.targets, sets.ids));
        const at::Tensor logits = at::linear(hidden, weight, bias);
        const TokenLogps want = token_logps(without_others(logits, sets), sets.targets, kOptions);
        expect_close(out.logps, want.logps, what);
        expect_close(out.entropies, want.entropies, what);
        std::vector<at::Tensor> leaves{hidden, weight};
        if (with_bias) leaves.push_back(bias);
        const auto got = gradients(out, leaves), expected = gradients(want, leaves);
        for (size_t i = 0; i < leaves.size(); ++i) expect_close(got[i], expected[i], what);
      }
    }
  }
}

TEST(Support, IdsOneTokenAfterTheOtherAreTheSameSets) {
  const Sets sets = random_sets(5);
  const at::Tensor flat = sets.ids.view({-1, 5}), sizes = (flat >= 0).sum(-1);
  const at::Tensor offsets = at::cat({at::zeros({1}, at::kLong), sizes.cumsum(0)});
  const Support padded = support(sets.targets, sets.ids);
  const Support other =
      support(sets.targets, flat.index({flat >= 0}).to(at::kInt), offsets.to(at::kInt));
  EXPECT_TRUE(at::equal(padded.ids, other.ids));
  EXPECT_TRUE(at::equal(padded.position, other.position));
  EXPECT_TRUE(at::equal(padded.whole, other.whole));
  EXPECT_TRUE(at::equal(padded.added, other.added));
  EXPECT_EQ(padded.whole.sum().item<int64_t>(), 1);
  EXPECT_FALSE(padded.added[1].any().item<bool>());
}

TEST(Support, IdsThatAreThereTwiceCountOnce) {
  const Sets sets = random_sets(5);
  const Support once = support(sets.targets, sets.ids);
  const Support twice = support(sets.targets, sets.ids.repeat({1, 1, 2}));
  EXPECT_TRUE(at::equal(once.ids, twice.ids));
  EXPECT_TRUE(at::equal(once.position, twice.position));
}

TEST(Support, TheKernelEqualsTorch) {
  for (const at::ScalarType type : {at::kFloat, at::kBFloat16, at::kHalf, at::kDouble}) {
    const Sets sets = random_sets(5);
    const at::Tensor logits = at::randn({2, 4, kVocabulary}).to(type).requires_grad_();
    const Support kept = support(sets.targets, sets.ids);
    const TokenLogps out = token_logps(logits, sets.targets, kOptions, kept);
    const at::Tensor by_torch = without_others(logits, sets);
    const TokenLogps want = detail::token_logps_any_device(by_torch, sets.targets, kOptions);
    const double bound = type == at::kDouble ? 1e-14 : 2e-6;
    EXPECT_TRUE(at::allclose(out.logps, want.logps, bound, bound));
    EXPECT_TRUE(at::allclose(out.entropies, want.entropies, bound, bound));
    const double rounding = type == at::kBFloat16 ? 0x1p-7 : type == at::kHalf ? 0x1p-10 : bound;
    EXPECT_TRUE(at::allclose(gradients(out, {logits})[0], gradients(want, {logits})[0], rounding,
                             rounding));
  }
}

TEST(Support, TheGradientMayGoToMemoryOfTheCaller) {
  const Sets sets = random_sets(5);
  const at::Tensor logits = leaf({2, 4, kVocabulary});
  const Support kept = support(sets.targets, sets.ids);
  const at::Tensor want = gradients(token_logps(logits, sets.targets, kOptions, kept), {logits})[0];
  const at::Tensor in_place = logits.detach().clone().requires_grad_();
  for (const at::Tensor& in : {logits, in_place}) {
    TokenLogpsOptions options = kOptions;
    options.gradient_buffer = in.is_same(logits) ? at::full_like(logits, NAN) : in.detach();
    const at::Tensor got = gradients(token_logps(in, sets.targets, options, kept), {in})[0];
    EXPECT_EQ(got.data_ptr(), options.gradient_buffer.data_ptr());
    EXPECT_TRUE(at::equal(got, want));
  }
}

TEST(Support, AShardIsThatOfItsOwnColumns) {
  const Sets sets = random_sets(5);
  const at::Tensor logits = leaf({2, 4, kVocabulary});
  const Support kept = support(sets.targets, sets.ids);
  const TokenLogps whole = token_logps(logits, sets.targets, kOptions, kept);
  std::vector<at::Tensor> blocks;
  std::vector<TokenLogps> ranks;
  const auto call = [&](int64_t rank, auto gather) {
    TokenLogpsOptions options = kOptions;
    options.shard = {.first_id = 512 * rank, .ids = kVocabulary, .gather = gather};
    return token_logps(logits.slice(-1, 512 * rank, 512 * rank + 512), sets.targets, options, kept);
  };
  for (const int64_t rank : {0, 1}) {
    message([&] {
      call(rank, [&](const at::Tensor& ours) -> at::Tensor {
        blocks.push_back(ours.clone());
        throw Error("taken");
      });
    });
  }
  for (const int64_t rank : {0, 1}) {
    ranks.push_back(call(rank, [&](const at::Tensor&) { return at::stack(blocks); }));
    expect_close(ranks.back().logps, whole.logps, "logps");
    expect_close(ranks.back().entropies, whole.entropies, "entropies");
  }
  const at::Tensor want = gradients(whole, {logits})[0];
  expect_close(gradients(ranks[0], {logits})[0] + gradients(ranks[1], {logits})[0], want,
               "gradient");
}

TEST(Support, RowsOfAFixedSizeDoNotDependOnTheBatch) {
  const Sets sets = random_sets(5);
  const Support all = support(sets.targets, sets.ids);
  const auto cut = [](const at::Tensor& x) { return x.slice(0, 1, 2); };
  const at::Tensor hidden = leaf({2, 4, kWidth}), weight = leaf({kVocabulary, kWidth});
  const LinearOptions fixed{.rows_per_chunk = 4};
  const TokenLogps both = linear_token_logps(hidden, {weight}, sets.targets, fixed, all);
  const TokenLogps alone =
      linear_token_logps(cut(hidden), {weight}, cut(sets.targets), fixed,
                         {cut(all.ids), cut(all.position), cut(all.whole), cut(all.added)});
  EXPECT_TRUE(at::equal(alone.logps, cut(both.logps)));
  expect_close(both.logps, linear_token_logps(hidden, {weight}, sets.targets, {}, all).logps, "");
}

TEST(Support, AnUnknownSetIsRefused) {
  const Sets sets = random_sets(3);
  const auto of = [&](const at::Tensor& ids, const at::Tensor& offsets = {}) {
    return message([&] { support(sets.targets, ids, offsets); });
  };
  EXPECT_EQ(of({}), "support: token_ids must be given, got none");
  EXPECT_EQ(of(sets.ids.to(at::kFloat)), "support: token_ids must be int32 or int64, got float32");
  EXPECT_EQ(of(sets.targets),
            "support: token_ids must be [..., K] like targets [2, 4] without offsets, got [2, 4]");
  EXPECT_EQ(of(at::full({2, 4, 1}, -2)),
            "support: token_ids must be at least 0, or -1 for none, got -2");
  EXPECT_EQ(of(sets.ids, at::zeros({9}, at::kLong)),
            "support: token_ids must be [M] with offsets, got [2, 4, 3]");
  EXPECT_EQ(of(at::zeros({1}, at::kLong), at::zeros({1}, at::kLong)),
            "support: offsets must be [9] for targets [2, 4], got [1]");
  EXPECT_EQ(of(at::zeros({1}, at::kLong), at::zeros({9}, at::kLong)),
            "support: offsets must run from 0 to 1, the size of token_ids, got 0 to 0");
}

TEST(Support, AnotherSupportIsRefused) {
  const Sets sets = random_sets(3);
  const at::Tensor logits = at::randn({2, 4, kVocabulary});
  const Support good = support(sets.targets, sets.ids);
  const auto with = [&](const at::Tensor& targets, const Support& given,
                        const TokenLogpsOptions& options = {}) {
    return message([&] { token_logps(logits, targets, options, given); });
  };
  EXPECT_EQ(with(sets.targets, {}), "token_logps: support must be given, got none");
  EXPECT_EQ(with((sets.targets + 1).remainder(kVocabulary), good),
            "token_logps: support must be made of the same targets, got others");
  Support strange = good;
  strange.ids = good.ids.to(at::kFloat);
  EXPECT_EQ(with(sets.targets, strange),
            "token_logps: support must be as tether::support makes it, got another");
  Support high = good;
  high.ids = good.ids + kVocabulary;
  EXPECT_EQ(with(sets.targets, high), "token_logps: support must have ids below 1024, got " +
                                          std::to_string(high.ids.max().item<int64_t>()));
}

TEST(Support, OfAPartOfTheBatch) {
  const Sets sets = random_sets(5);
  const Support all = support(sets.targets, sets.ids);
  const auto cut = [](const at::Tensor& x) { return x.slice(1, 1, 3); };
  const Support part{cut(all.ids), cut(all.position), cut(all.whole), cut(all.added)};
  const at::Tensor hidden = leaf({2, 4, kWidth}), weight = leaf({kVocabulary, kWidth});
  const TokenLogps want = linear_token_logps(hidden, {weight}, sets.targets, {}, all);
  const TokenLogps out = linear_token_logps(cut(hidden), {weight}, cut(sets.targets), {}, part);
  expect_close(out.logps, cut(want.logps), "logps");
}

TEST(Support, ASecondDerivativeIsRefused) {
  const Sets sets = random_sets(3);
  const at::Tensor hidden = leaf({2, 4, kWidth}), weight = leaf({kVocabulary, kWidth});
  const TokenLogps out =
      linear_token_logps(hidden, {weight}, sets.targets, {}, support(sets.targets, sets.ids));
  const at::Tensor first = torch::autograd::grad({out.logps.square().sum()}, {hidden}, {},
                                                 std::nullopt, /*create_graph=*/true)[0];
  EXPECT_NE(message([&] {
              torch::autograd::grad({first.square().sum()}, {hidden});
            }).find("the gradient must not be differentiated"),
            std::string::npos);
}

}  // namespace
}  // namespace tether
