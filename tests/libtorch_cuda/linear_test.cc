// Functions of hidden states on the way of CUDA tensors.

#include <gtest/gtest.h>
#include <torch/library.h>
#include <torch/torch.h>

#include <limits>
#include <optional>
#include <string>
#include <vector>

#include "libtorch/linear_sweep.h"
#include "libtorch/linear_token_logps.h"
#include "libtorch/support.h"
#include "tests/libtorch/message.h"
#include "tests/libtorch_cuda/host_door.h"

namespace tether {
namespace {

constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();
constexpr int64_t kHidden = 6, kVocabulary = 31;

// Tokens [3, 4], two of them ignored, whose hidden states are not to reach anything.
struct Linear {
  at::Tensor hidden, weight, bias, targets;

  explicit Linear(at::ScalarType dtype, bool with_bias = true) {
    torch::manual_seed(9);
    hidden = (2 * torch::randn({3, 4, kHidden})).to(dtype);
    weight = torch::randn({kVocabulary, kHidden}).to(dtype);
    if (with_bias) bias = torch::randn({kVocabulary}).to(dtype);
    targets = torch::randint(kVocabulary, {3, 4}, at::kLong);
    targets[0][2] = targets[2][3] = -100;
    hidden[0][2] = kNaN;
    hidden[2][3] = std::numeric_limits<double>::infinity();
  }

  // As many bytes as so many rows of logits have.
  int64_t bytes(int64_t rows) const {
    return rows * kVocabulary * static_cast<int64_t>(weight.element_size());
  }
};

at::Tensor leaf(const at::Tensor& tensor) {
  return tensor.defined() ? tensor.detach().clone().requires_grad_() : tensor;
}

// Results and gradients, of upstream ones that differ and are 0 at a token.
Results evaluated(const Linear& in, LinearOptions options, const Support* kept = nullptr) {
  options.row.temperature = 0.7;
  const at::Tensor hidden = leaf(in.hidden), weight = leaf(in.weight), bias = leaf(in.bias);
  const LinearHead head{weight, bias};
  const TokenLogps out = kept ? linear_token_logps(hidden, head, in.targets, options, *kept)
                              : linear_token_logps(hidden, head, in.targets, options);
  at::Tensor upstream = torch::linspace(-1, 2, 12).view({3, 4});
  at::Tensor sum = (upstream.index_fill(1, torch::tensor({1}), 0) * out.logps).sum();
  Results results{out.logps.detach()};
  if (options.entropies) {
    sum = sum + (upstream.flip(0).index_fill(1, torch::tensor({1}), 0) * out.entropies).sum();
    results.push_back(out.entropies.detach());
  }
  sum.backward();
  for (const at::Tensor& each : {hidden, weight, bias}) {
    results.push_back(each.defined() ? each.grad() : each);
  }
  if (!options.statistics) return results;
  results.insert(results.end(),
                 {out.sum_of_squared_p, out.mean_logits, out.target_is_largest.to(at::kFloat)});
  return results;
}

// torch's products of halves with sums in float32, which it has on CUDA alone.
int wide_products = 0;
at::Tensor& mm_out(const at::Tensor& a, const at::Tensor& b, at::ScalarType type, at::Tensor& out) {
  ++wide_products;
  return out.copy_(at::mm(a.to(type), b.to(type)));
}
at::Tensor& addmm_out(const at::Tensor& sum, const at::Tensor& a, const at::Tensor& b,
                      at::ScalarType type, const at::Scalar&, const at::Scalar&, at::Tensor& out) {
  ++wide_products;
  return out.copy_(sum + at::mm(a.to(type), b.to(type)));
}
TORCH_LIBRARY_IMPL(aten, CPU, library) {
  library.impl("mm.dtype_out", mm_out);
  library.impl("addmm.dtype_out", addmm_out);
}

struct Chunking {
  LinearOptions options;
  int count;  // of chunks
};

std::vector<Chunking> chunkings(const Linear& in) {
  return {{{}, 1},
          {{.chunk_bytes = in.bytes(5)}, 3},
          {{.chunk_bytes = 1}, 12},
          {{.rows_per_chunk = 5}, 3},
          {{.rows_per_chunk = 16}, 1}};
}

TEST(LinearTokenLogpsOnCuda, AreThoseOfTheCpu) {
  for (const at::ScalarType dtype : {at::kFloat, at::kBFloat16, at::kHalf}) {
    const Linear in(dtype, dtype != at::kHalf);
    for (auto [options, count] : chunkings(in)) {
      for (const bool all : {false, true}) {
        options.entropies = options.statistics = all;
        expect_as_on_cpu([&] { return evaluated(in, options); }, 2 * count,
                         dtype == at::kFloat ? 2e-5 : 5e-2, "chunks " + std::to_string(count));
      }
    }
  }
}

TEST(LinearTokenLogpsOnCuda, OfKeptIdsAreThoseOfTheCpu) {
  const Linear in(at::kFloat);
  at::Tensor ids = std::get<1>(torch::rand({3, 4, kVocabulary}).sort(-1)).slice(-1, 0, 5).clone();
  ids[1][0].fill_(-1);
  ids[1][1].slice(0, 2).fill_(-1);
  const Support kept = support(in.targets, ids);
  for (auto [options, count] : chunkings(in)) {
    options.entropies = options.statistics = true;
    expect_as_on_cpu([&] { return evaluated(in, options, &kept); }, 2 * count, 2e-5, "kept ids");
  }
}

TEST(LinearTokenLogpsOnCuda, LeaveFrozenInputsAlone) {
  const Linear in(at::kFloat);
  for (size_t frozen = 0; frozen < 3; ++frozen) {
    const auto run = [&]() -> Results {
      Results inputs{leaf(in.hidden), leaf(in.weight), leaf(in.bias)};
      inputs[frozen].requires_grad_(false);
      const TokenLogps out = linear_token_logps(inputs[0], {inputs[1], inputs[2]}, in.targets,
                                                {.chunk_bytes = in.bytes(5)});
      (torch::linspace(-1, 2, 12).view({3, 4}) * out.logps).sum().backward();
      return {inputs[0].grad(), inputs[1].grad(), inputs[2].grad()};
    };
    expect_as_on_cpu(run, 6, 2e-5, "frozen");
  }
}

TEST(LinearTokenLogpsOnCuda, BackwardTwiceIsTheSame) {
  const Linear in(at::kFloat);
  const OnCuda door;
  const at::Tensor hidden = leaf(in.hidden), weight = leaf(in.weight);
  const at::Tensor sum = (linear_token_logps(hidden, {weight}, in.targets).logps *
                          torch::linspace(-1, 2, 12).view({3, 4}))
                             .sum();
  const auto slopes = [&] { return torch::autograd::grad({sum}, {hidden, weight}, {}, true); };
  const Results first = slopes();
  expect_same(slopes(), first, 1e-6, "twice");
}

TEST(LinearTokenLogpsOnCuda, OfNoTokens) {
  const Linear in(at::kFloat);
  const auto run = [&]() -> Results {
    const at::Tensor hidden = torch::zeros({0, kHidden}).requires_grad_(), weight = leaf(in.weight);
    const TokenLogps out = linear_token_logps(hidden, {weight}, torch::zeros({0}, at::kLong),
                                              {.entropies = true, .statistics = true});
    (out.logps + out.entropies).sum().backward();
    return {out.logps.detach(), out.sum_of_squared_p, hidden.grad(), weight.grad()};
  };
  expect_as_on_cpu(run, 0, 0, "no tokens");
}

// Beside the exact sum, rounded once.
TEST(LinearTokenLogpsOnCuda, TheGradientOfAHalfWeightIsAddedUpInFloat32) {
  torch::manual_seed(1);
  const auto halves = [](at::IntArrayRef sizes) { return torch::randn(sizes).to(at::kBFloat16); };
  const at::Tensor hidden = halves({6, 8}), weight = halves({5, 8}), dlogits = halves({6, 5});
  const detail::LinearInputs inputs{hidden, weight};
  const OnCuda door;
  const auto gradient = [&](const std::vector<int64_t>& bounds) {
    detail::LinearGradientSum sum(inputs, {true, true, false}, int64_t(bounds.size()) - 1);
    for (size_t i = 0; i + 1 < bounds.size(); ++i) {
      const int64_t begin = bounds[i], end = bounds[i + 1];
      sum.add({.begin = begin,
               .count = end - begin,
               .hidden = hidden.slice(0, begin, end),
               .logits = dlogits.slice(0, begin, end),
               .targets = {},
               .rows = {},
               .support = {}});
    }
    return sum.take().weight;
  };
  const at::Tensor exact = at::mm(dlogits.to(at::kDouble).t(), hidden.to(at::kDouble));
  wide_products = 0;
  EXPECT_TRUE(at::equal(gradient({0, 3, 4, 6}), exact.to(at::kBFloat16)));
  EXPECT_EQ(wide_products, 3);
  EXPECT_TRUE(at::equal(gradient({0, 6}), exact.to(at::kBFloat16)));
  EXPECT_EQ(wide_products, 3);  // one chunk is rounded once anyway
}

TEST(LinearTokenLogpsOnCuda, AnIdOutOfRangeIsNaNForItsRow) {
  Linear in(at::kFloat);
  in.targets[1][1] = kVocabulary;
  const auto logps = [&] {
    return linear_token_logps(in.hidden, {in.weight, in.bias}, in.targets).logps;
  };
  EXPECT_EQ(
      message(logps),
      "linear_token_logps: targets must be in [0, 31) or ignore_index -100, got 31 at [1, 1]");
  const OnCuda door;
  EXPECT_EQ(logps().isnan().sum().item<int64_t>(), 1);
  EXPECT_TRUE(logps()[1][1].isnan().item<bool>());
}

TEST(LinearTokenLogpsOnCuda, ChunksAreLargerThanOnTheCpu) {
  const detail::LinearInputs inputs{torch::zeros({2, kHidden}), torch::zeros({8, kHidden})};
  EXPECT_EQ(detail::bytes_of_chunk(inputs, {}), 256 << 20);
  const OnCuda door;
  EXPECT_EQ(detail::bytes_of_chunk(inputs, {}), 1024 << 20);
  EXPECT_EQ(detail::bytes_of_chunk(inputs, {.chunk_bytes = 5}), 5);
}

TEST(LinearTokenLogpsOnCuda, TakeAnotherWayInFloat64) {
  const Linear in(at::kDouble);
  const Results want = evaluated(in, {});
  const OnCuda door;
  expect_same(evaluated(in, {}), want, 0, "float64");
  EXPECT_EQ(door.taken(), 0);
}

TEST(LinearTokenLogpsOnCuda, ASecondBackwardRaises) {
  const Linear in(at::kFloat);
  const OnCuda door;
  const at::Tensor hidden = leaf(in.hidden);
  const at::Tensor sum = linear_token_logps(hidden, {in.weight}, in.targets).logps.sum();
  const at::Tensor slope = torch::autograd::grad({sum}, {hidden}, {}, true, true)[0];
  EXPECT_EQ(message([&] { torch::autograd::grad({slope.sum()}, {hidden}); }).substr(0, 62),
            "linear_token_logps: the gradient must not be differentiated ag");
}

TEST(LinearTokenLogpsOnCuda, RefuseWithTheSentenceOfTheCpu) {
  const Linear good(at::kFloat);
  const auto said = [&](const Linear& in, const LinearOptions& options) {
    return message(
        [&] { linear_token_logps(in.hidden, {in.weight, in.bias}, in.targets, options); });
  };
  const auto expect_same_sentence = [&](const Linear& in, const LinearOptions& options) {
    const std::string want = said(in, options);
    EXPECT_NE(want, "no error");
    const OnCuda door;
    EXPECT_EQ(said(in, options), want);
  };
  expect_same_sentence(good, {.chunk_bytes = 0});
  expect_same_sentence(good, {.rows_per_chunk = -1});
  expect_same_sentence(good, {.row = {.temperature = 0}});
  Linear bad = good;
  bad.weight = bad.weight.slice(1, 1);
  expect_same_sentence(bad, {});
  bad = good;
  bad.targets = bad.targets.slice(1, 1);
  expect_same_sentence(bad, {});
}

// Tensors without memory: whoever looks into one throws.
TEST(LinearTokenLogpsOnCuda, TheDoorWaitsForNothing) {
  detail::CudaKernels kernels = without_rows();
  Linear in(at::kFloat);
  for (at::Tensor* each : {&in.hidden, &in.weight, &in.bias, &in.targets}) {
    *each = each->to(at::kMeta);
  }
  const OnCuda door(kernels);
  for (const LinearOptions& each : {LinearOptions{}, LinearOptions{.chunk_bytes = in.bytes(5)},
                                    LinearOptions{.rows_per_chunk = 5}}) {
    LinearOptions options = each;
    options.entropies = options.statistics = true;
    const at::Tensor hidden = in.hidden.detach().requires_grad_();
    const at::Tensor weight = in.weight.detach().requires_grad_();
    const TokenLogps out = linear_token_logps(hidden, {weight, in.bias}, in.targets, options);
    (out.logps + out.entropies).sum().backward();
    EXPECT_TRUE(hidden.grad().is_meta() && weight.grad().is_meta());
    EXPECT_TRUE(out.mean_logits.is_meta());
  }
}

}  // namespace
}  // namespace tether
