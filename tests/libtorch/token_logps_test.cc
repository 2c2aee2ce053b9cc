#include "libtorch/token_logps.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <gtest/gtest.h>
#include <torch/csrc/autograd/autograd.h>

#include <limits>
#include <string>
#include <vector>

namespace tether {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr double kNan = std::numeric_limits<double>::quiet_NaN();
const TokenLogpsOptions kWithEntropies = {.entropies = true};

using Call = TokenLogps (*)(const at::Tensor&, const at::Tensor&, const TokenLogpsOptions&);

at::Tensor random_logits(at::IntArrayRef sizes, at::ScalarType type, double scale = 3) {
  return (at::randn(sizes, at::kDouble) * scale).to(type);
}

at::Tensor random_targets(const at::Tensor& logits) {
  return at::randint(logits.size(-1), logits.sizes().slice(0, logits.dim() - 1), at::kLong);
}

at::Tensor leaf(const at::Tensor& tensor) { return tensor.detach().requires_grad_(); }

at::Tensor gradient(const at::Tensor& of, const at::Tensor& in, const at::Tensor& upstream = {}) {
  return torch::autograd::grad({of}, {in}, {upstream})[0];
}

// logps, entropies and the gradient of sum(a logps + b entropies).
std::vector<at::Tensor> results(Call call, const at::Tensor& logits, const at::Tensor& targets,
                                TokenLogpsOptions options = {}) {
  options.entropies = true;
  const at::Tensor x = logits.requires_grad() ? logits : leaf(logits);
  const TokenLogps out = call(x, targets, options);
  const at::Tensor a = at::linspace(0.5, 2, targets.numel(), at::kDouble).view(targets.sizes());
  const at::Tensor loss = (out.logps * a + out.entropies * (1.7 - a)).sum();
  return {out.logps.detach(), out.entropies.detach(), gradient(loss, x)};
}

void expect_same(const std::vector<at::Tensor>& got, const std::vector<at::Tensor>& want,
                 double tolerance, const std::string& what) {
  for (size_t i = 0; i < want.size(); ++i) {
    ASSERT_EQ(got[i].sizes(), want[i].sizes()) << what;
    EXPECT_TRUE(at::allclose(got[i].to(at::kDouble), want[i].to(at::kDouble), tolerance, tolerance,
                             /*equal_nan=*/true))
        << what << ", result " << i;
  }
}

TokenLogps by_log_softmax(const at::Tensor& logits, const at::Tensor& targets,
                          const TokenLogpsOptions& options) {
  at::Tensor x = logits * options.row.scale;
  if (options.row.softcap > 0) x = options.row.softcap * at::tanh(x / options.row.softcap);
  x = x / options.row.temperature;
  const at::Tensor log_p = at::log_softmax(x, -1), p = log_p.exp();
  return {.logps = log_p.gather(-1, targets.unsqueeze(-1)).squeeze(-1),
          .entropies = -(p * log_p).sum(-1),
          .sum_of_squared_p = p.square().sum(-1),
          .mean_logits = x.mean(-1),
          .target_is_largest = log_p.argmax(-1) == targets};
}

// ---- value and gradient -------------------------------------------------------------------------

TEST(TokenLogps, MatchesLogSoftmaxInDouble) {
  at::manual_seed(1);
  for (at::ScalarType type : {at::kFloat, at::kDouble, at::kBFloat16, at::kHalf}) {
    for (int64_t vocabulary : {1, 3, 17, 2049, 32000}) {
      const at::Tensor logits = random_logits({2, 3, vocabulary}, type);
      const at::Tensor targets = random_targets(logits);
      const TokenLogpsOptions options = {.row = {.temperature = 0.8}};
      const auto got = results(token_logps, logits, targets, options);
      const auto want = results(by_log_softmax, logits.to(at::kDouble), targets, options);
      const bool wide = type == at::kDouble;
      EXPECT_EQ(got[0].scalar_type(), wide ? at::kDouble : at::kFloat);
      EXPECT_EQ(got[1].scalar_type(), wide ? at::kDouble : at::kFloat);
      EXPECT_EQ(got[2].scalar_type(), type);
      const std::string what = std::string(c10::toString(type)) + " " + std::to_string(vocabulary);
      expect_same({got[0], got[1]}, {want[0], want[1]}, wide ? 1e-13 : 4e-6, what);
      const double rounding = type == at::kBFloat16 ? 0x1p-8 : type == at::kHalf ? 0x1p-11 : 4e-6;
      expect_same({got[2]}, {want[2]}, wide ? 1e-13 : rounding, what);
    }
  }
}

TEST(TokenLogps, EntropiesOfFarColumnsHaveNoSlopeAtAnyUpstreamGradient) {
  const at::Tensor target = at::tensor({0}, at::kLong), upstream = at::tensor({1e9f});
  for (Call call : {token_logps, detail::token_logps_any_device}) {
    const at::Tensor logits = at::tensor({0.0f, 1e30f}).view({1, 2}).requires_grad_(true);
    const at::Tensor out = call(logits, target, {.entropies = true}).entropies;
    const at::Tensor got = torch::autograd::grad({out}, {logits}, {upstream})[0];
    EXPECT_TRUE(at::equal(got, at::zeros({1, 2}))) << got;
  }
}

TEST(TokenLogps, AnyDevicePathGivesTheSame) {
  at::manual_seed(2);
  for (at::ScalarType type : {at::kFloat, at::kDouble, at::kBFloat16, at::kHalf}) {
    at::Tensor logits = random_logits({4, 5, 50}, type);
    logits.masked_fill_(at::rand({4, 5, 50}) < 0.3, -kInfinity);
    at::Tensor targets = random_targets(logits);
    targets[1][2] = -5;
    logits[1][2].fill_(kNan);
    logits[3][0][7] = -kInfinity;
    targets[3][0] = 7;  // a target that is not there
    const TokenLogpsOptions options = {.row = {.temperature = 1.3, .ignore_index = -5}};
    const auto got = results(detail::token_logps_any_device, logits, targets, options);
    const auto want = results(token_logps, logits, targets, options);
    const double tolerance = type == at::kDouble ? 1e-13 : type == at::kFloat ? 4e-6 : 0x1p-7;
    expect_same(got, want, tolerance, c10::toString(type));
    EXPECT_EQ(got[0].scalar_type(), want[0].scalar_type());
    EXPECT_EQ(got[0][3][0].item<double>(), -kInfinity);
    for (const auto& result : {got, want}) {
      EXPECT_EQ(result[0][1][2].item<double>(), 0);
      EXPECT_EQ(result[1][1][2].item<double>(), 0);
      EXPECT_EQ(result[2][1][2].abs().max().item<double>(), 0);
      const at::Tensor absent = result[2].masked_select(logits == -kInfinity);
      EXPECT_EQ(absent.abs().max().item<double>(), 0);
    }
  }
}

TEST(TokenLogps, AnInfiniteLogitIsNanUnderACapToo) {
  for (double softcap : {0.0, 5.0}) {
    for (Call call : {token_logps, detail::token_logps_any_device}) {
      const at::Tensor logits = random_logits({2, 40}, at::kFloat);
      logits[0][3] = kInfinity;
      const at::Tensor targets = at::ones({2}, at::kLong);
      for (const at::Tensor& each : results(call, logits, targets, {.row = {.softcap = softcap}})) {
        EXPECT_TRUE(each[0].isnan().all().item<bool>()) << softcap;
        EXPECT_TRUE(each[1].isfinite().all().item<bool>()) << softcap;
      }
    }
  }
}

TEST(TokenLogps, ScaleAndSoftcap) {
  at::manual_seed(5);
  for (at::ScalarType type : {at::kFloat, at::kDouble, at::kBFloat16}) {
    const at::Tensor logits = random_logits({3, 4, 333}, type, 9);
    const at::Tensor targets = random_targets(logits);
    for (double softcap : {0.0, 12.0}) {
      const TokenLogpsOptions options = {
          .row = {.temperature = 0.7, .scale = 1.5, .softcap = softcap}};
      const auto want = results(by_log_softmax, logits.to(at::kDouble), targets, options);
      for (Call call : {token_logps, detail::token_logps_any_device}) {
        const auto got = results(call, logits, targets, options);
        const double tolerance = type == at::kDouble ? 1e-13 : 1e-5;
        expect_same({got[0], got[1]}, {want[0], want[1]}, tolerance, c10::toString(type));
        expect_same({got[2]}, {want[2]}, type == at::kBFloat16 ? 0x1p-7 : tolerance,
                    c10::toString(type));
      }
    }
  }
}

TEST(TokenLogps, StatisticsOnRequest) {
  at::manual_seed(6);
  const at::Tensor logits = random_logits({5, 60}, at::kDouble);
  at::Tensor targets = random_targets(logits);
  targets[2] = logits[2].argmax();
  TokenLogpsOptions options = {.row = {.temperature = 0.6, .softcap = 20}, .statistics = true};
  const TokenLogps want = by_log_softmax(logits, targets, options);
  for (Call call : {token_logps, detail::token_logps_any_device}) {
    const TokenLogps got = call(leaf(logits), targets, options);
    expect_same({got.logps.detach(), got.sum_of_squared_p, got.mean_logits},
                {want.logps, want.sum_of_squared_p, want.mean_logits}, 1e-13, "statistics");
    EXPECT_TRUE(at::equal(got.target_is_largest, want.target_is_largest));
    EXPECT_TRUE(got.target_is_largest[2].item<bool>());
    EXPECT_FALSE(got.mean_logits.requires_grad());
    EXPECT_FALSE(got.entropies.defined());
  }
  const TokenLogps without = token_logps(logits, targets);
  EXPECT_FALSE(without.sum_of_squared_p.defined() || without.target_is_largest.defined());
}

// ---- caller-owned gradients ---------------------------------------------------------------------

TEST(TokenLogps, GradientGoesIntoTheBuffer) {
  at::manual_seed(7);
  for (at::ScalarType type : {at::kFloat, at::kDouble, at::kBFloat16, at::kHalf}) {
    const at::Tensor whole = random_logits({3, 5, 70}, type);
    const at::Tensor logits = whole.slice(1, 0, -1), targets = random_targets(logits);
    const at::Tensor want = results(token_logps, logits, targets)[2];
    const at::Tensor buffers[] = {at::full_like(logits, 7),
                                  at::full_like(whole, 7).slice(1, 0, -1)};
    for (const at::Tensor& buffer : buffers) {
      const at::Tensor got = results(token_logps, logits, targets, {.gradient_buffer = buffer})[2];
      EXPECT_TRUE(at::equal(got, want));
      EXPECT_EQ(got.data_ptr(), buffer.data_ptr());
    }
    const at::Tensor owner = leaf(whole);
    const at::Tensor in_place = (owner * 1).slice(1, 0, -1);
    const at::Tensor logits_before = in_place.detach().clone();
    TokenLogpsOptions options = kWithEntropies;
    options.gradient_buffer = in_place;
    const TokenLogps out = token_logps(in_place, targets, options);
    EXPECT_TRUE(at::equal(in_place.detach(), logits_before));
    const at::Tensor a = at::linspace(0.5, 2, targets.numel(), at::kDouble).view(targets.sizes());
    const at::Tensor loss = (out.logps * a + out.entropies * (1.7 - a)).sum();
    loss.backward({}, /*retain_graph=*/true);
    EXPECT_TRUE(at::equal(in_place.detach(), want));
    EXPECT_TRUE(at::equal(owner.grad().slice(1, 0, -1), want));
    EXPECT_THROW(loss.backward(), c10::Error);  // the logits are gone
  }
}

TEST(TokenLogps, ABufferUsedAgainLeavesGradientsOfLeavesAlone) {
  const at::Tensor values = random_logits({3, 20}, at::kDouble);
  const at::Tensor targets = random_targets(values);
  const at::Tensor alone = leaf(values);
  const at::Tensor want = 3 * gradient(token_logps(alone, targets).logps.sum(), alone);
  for (const bool viewed : {false, true}) {
    const at::Tensor owner = leaf(values);
    const TokenLogpsOptions options = {.gradient_buffer = at::empty_like(values)};
    for (const double factor : {1.0, 2.0}) {
      const at::Tensor logits = viewed ? owner.view({60}).view({3, 20}) : owner;
      (factor * token_logps(logits, targets, options).logps.sum()).backward();
    }
    EXPECT_TRUE(at::allclose(owner.grad(), want)) << viewed;
  }
}

TEST(TokenLogps, WhoeverElseSavedTheLogitsIsTold) {
  const at::Tensor logits = leaf(random_logits({3, 20}, at::kFloat)) * 1;
  const at::Tensor squares = logits.square().sum();
  const TokenLogpsOptions options = {.gradient_buffer = logits};
  token_logps(logits, random_targets(logits), options).logps.sum().backward();
  EXPECT_THROW(squares.backward(), c10::Error);
}

TEST(TokenLogps, GradientOnlyWhereAsked) {
  const at::Tensor logits = random_logits({2, 8}, at::kFloat);
  const at::Tensor targets = random_targets(logits);
  EXPECT_FALSE(token_logps(logits, targets, kWithEntropies).entropies.requires_grad());
  EXPECT_TRUE(token_logps(leaf(logits), targets, kWithEntropies).entropies.requires_grad());
  const at::NoGradGuard no_grad;
  EXPECT_FALSE(token_logps(leaf(logits), targets).logps.requires_grad());
}

TEST(TokenLogps, EntropiesOnlyOnRequest) {
  const at::Tensor logits = random_logits({2, 8}, at::kFloat);
  EXPECT_FALSE(token_logps(logits, random_targets(logits)).entropies.defined());
  EXPECT_TRUE(token_logps(logits, random_targets(logits), kWithEntropies).entropies.defined());
}

// ---- layouts ------------------------------------------------------------------------------------

TEST(TokenLogps, LogitsOfAnyLayout) {
  at::manual_seed(3);
  const at::Tensor base = random_logits({3, 5, 4, 40}, at::kFloat);
  const at::Tensor layouts[] = {
      base.slice(1, 0, -1),                          // the usual logits[:, :-1]
      base.select(2, 1).slice(1, 0, -1),             //
      base.select(2, 1).transpose(0, 1),             // [L, B, V]
      base.permute({2, 0, 1, 3}),                    // three strides: copied
      base.slice(2, 0, 3),                           // the first two lie end to end
      base.transpose(0, 3),                          // V is not the last in memory
      base.slice(3, 1, 40, 3),                       // every third logit
      base[0][0].unsqueeze(1).expand({4, 6, 40}),    // rows shared
      base[0][0][0].unsqueeze(0).expand({7, 40}),    // one row
      base[0][0][0].slice(0, 3, 4).expand({2, 40}),  // all logits equal
      base[0][0][0],                                 // [V], one target
      base.slice(0, 1, 2).slice(2, 2, 3),            // dimensions of size 1
  };
  for (const at::Tensor& logits : layouts) {
    const at::Tensor targets = random_targets(logits);
    const auto want = results(token_logps, logits.contiguous(), targets);
    const auto got = results(token_logps, logits, targets);
    for (size_t i = 0; i < 3; ++i) EXPECT_TRUE(at::equal(got[i], want[i])) << logits.strides();
  }
}

TEST(TokenLogps, UpstreamGradientsOfAnyLayout) {
  at::manual_seed(4);
  const at::Tensor logits = leaf(random_logits({3, 6, 30}, at::kFloat));
  const at::Tensor targets = random_targets(logits);
  const at::Tensor wide = at::randn({6, 8, 2});
  for (const at::Tensor& upstream :
       {at::scalar_tensor(0.7).expand({3, 6}), at::randn({3, 1}).expand({3, 6}),
        wide.select(2, 1).slice(1, 2, 8, 2).t(), at::randn({3, 6})}) {
    for (bool entropies : {false, true}) {
      const auto output = [&](Call call, const at::Tensor& x) {
        const TokenLogps out = call(x, targets, kWithEntropies);
        return entropies ? out.entropies : out.logps;
      };
      const at::Tensor x = leaf(logits.to(at::kDouble));
      const at::Tensor want = gradient(output(by_log_softmax, x), x, upstream.to(at::kDouble));
      const at::Tensor got = gradient(output(token_logps, logits), logits, upstream);
      expect_same({got}, {want}, 4e-6, entropies ? "entropies" : "logps");
    }
  }
}

TEST(TokenLogps, IdsOfAnyLayoutAndWidth) {
  const at::Tensor logits = random_logits({3, 4, 20}, at::kFloat);
  const at::Tensor targets = at::randint(20, {4, 3, 2}, at::kLong).select(2, 1).t();
  const at::Tensor want = token_logps(logits, targets.contiguous()).logps;
  EXPECT_TRUE(at::equal(token_logps(logits, targets).logps, want));
  EXPECT_TRUE(at::equal(token_logps(logits, targets.to(at::kInt)).logps, want));
}

TEST(TokenLogps, InputsAreUntouched) {
  const at::Tensor logits = leaf(random_logits({3, 4, 20}, at::kFloat));
  const at::Tensor targets = random_targets(logits);
  const at::Tensor logits_before = logits.detach().clone(), targets_before = targets.clone();
  const auto version = logits._version();
  results(token_logps, logits, targets);
  EXPECT_TRUE(at::equal(logits.detach(), logits_before));
  EXPECT_TRUE(at::equal(targets, targets_before));
  EXPECT_EQ(logits._version(), version);
}

TEST(TokenLogps, LogitsChangedBeforeBackwardAreNoticed) {
  const at::Tensor logits = leaf(random_logits({3, 20}, at::kFloat)) * 1;
  const at::Tensor logps = token_logps(logits, random_targets(logits)).logps;
  logits.mul_(2);
  EXPECT_THROW(logps.sum().backward(), c10::Error);
}

TEST(TokenLogps, ThreadsChangeNoBit) {
  const at::Tensor logits = random_logits({64, 3000}, at::kFloat);
  const at::Tensor targets = random_targets(logits);
  const int threads = at::get_num_threads();
  at::set_num_threads(1);
  const auto want = results(token_logps, logits, targets);
  for (int count : {2, 3, 8}) {
    at::set_num_threads(count);
    const auto got = results(token_logps, logits, targets);
    for (size_t i = 0; i < 3; ++i) EXPECT_TRUE(at::equal(got[i], want[i])) << count;
  }
  at::set_num_threads(threads);
}

TEST(TokenLogps, NoTokensIsFine) {
  for (const at::Tensor& logits :
       {at::randn({0, 8}), at::randn({3, 0, 8}), at::randn({2, 3, 0, 8})}) {
    const auto got = results(token_logps, logits,
                             at::zeros(logits.sizes().slice(0, logits.dim() - 1), at::kLong));
    EXPECT_EQ(got[2].sizes(), logits.sizes());
  }
}

// ---- second derivatives -------------------------------------------------------------------------

template <class Exception, class Body>
std::string message(Body body) {
  try {
    body();
  } catch (const Exception& error) {
    return error.what_without_backtrace();
  }
  return "no error";
}

TEST(TokenLogps, SecondBackwardIsRefused) {
  const at::Tensor logits = leaf(random_logits({3, 20}, at::kDouble));
  const at::Tensor logps = token_logps(logits, random_targets(logits)).logps;
  const at::Tensor first =
      torch::autograd::grad({logps.square().sum()}, {logits}, {}, {}, /*create_graph=*/true)[0];
  EXPECT_EQ(message<c10::NotImplementedError>([&] { first.square().sum().backward(); }),
            "token_logps: the gradient must not be differentiated again, got a second backward. "
            "Detach it, or use torch.log_softmax for second derivatives");
  const at::Tensor again = torch::autograd::grad({(logits * first.detach()).sum()}, {logits})[0];
  EXPECT_TRUE(at::equal(again, first.detach()));
}

// ---- errors -------------------------------------------------------------------------------------

template <class Exception>
std::string refusal(const at::Tensor& logits, const at::Tensor& targets,
                    const TokenLogpsOptions& options = {}) {
  return message<Exception>([&] { token_logps(logits, targets, options); });
}

TEST(TokenLogps, ShapesAreChecked) {
  const at::Tensor logits = at::zeros({4, 7, 32});
  EXPECT_EQ(refusal<c10::ValueError>(logits, at::zeros({4, 6}, at::kLong)),
            "token_logps: targets must be [4, 7] like logits [4, 7, 32], got [4, 6]");
  EXPECT_EQ(refusal<c10::ValueError>(logits, at::zeros({4, 7, 1}, at::kLong)),
            "token_logps: targets must be [4, 7] like logits [4, 7, 32], got [4, 7, 1]");
  EXPECT_EQ(refusal<c10::ValueError>(at::zeros({4, 0}), at::zeros({4}, at::kLong)),
            "token_logps: logits must be [..., V] with V at least 1, got [4, 0]");
  EXPECT_EQ(refusal<c10::ValueError>(at::zeros({}), at::zeros({}, at::kLong)),
            "token_logps: logits must be [..., V] with V at least 1, got []");
  EXPECT_EQ(refusal<c10::ValueError>(at::Tensor(), at::zeros({4}, at::kLong)),
            "token_logps: logits must be given, got none");
  EXPECT_EQ(refusal<c10::ValueError>(logits, at::Tensor()),
            "token_logps: targets must be given, got none");
}

TEST(TokenLogps, DtypesAndDevicesAreChecked) {
  const at::Tensor logits = at::zeros({4, 32}), targets = at::zeros({4}, at::kLong);
  EXPECT_EQ(refusal<c10::TypeError>(logits.to(at::kLong), targets),
            "token_logps: logits must be float32, float64, bfloat16 or float16, got int64");
  EXPECT_EQ(refusal<c10::TypeError>(logits, targets.to(at::kFloat)),
            "token_logps: targets must be int32 or int64, got float32");
  EXPECT_EQ(refusal<c10::TypeError>(logits, targets.to(at::kByte)),
            "token_logps: targets must be int32 or int64, got uint8");
  EXPECT_EQ(refusal<c10::ValueError>(logits, targets.to(at::kMeta)),
            "token_logps: targets must be on cpu like logits, got meta");
}

TEST(TokenLogps, BufferIsChecked) {
  const at::Tensor logits = at::zeros({4, 3, 32}), targets = at::zeros({4, 3}, at::kLong);
  const auto with = [&]<class Exception>(const at::Tensor& buffer, Exception*) {
    return refusal<Exception>(logits, targets, {.gradient_buffer = buffer});
  };
  const std::string name = "token_logps: gradient_buffer must ";
  EXPECT_EQ(with(at::zeros({12, 32}), (c10::ValueError*)nullptr),
            name + "be [4, 3, 32] like logits, got [12, 32]");
  EXPECT_EQ(with(at::zeros({4, 3, 32}, at::kHalf), (c10::TypeError*)nullptr),
            name + "be float32 like logits, got float16");
  EXPECT_EQ(with(at::zeros({4, 3, 32}, at::kMeta), (c10::ValueError*)nullptr),
            name + "be on cpu like logits, got meta");
  EXPECT_EQ(with(at::zeros({3, 32}).expand({4, 3, 32}), (c10::ValueError*)nullptr),
            name +
                "have memory of its own for every element in at most two steps between rows, "
                "got strides [0, 32, 1]");
  EXPECT_EQ(with(at::zeros({4, 3, 32}).requires_grad_(), (c10::ValueError*)nullptr),
            name + "not require a gradient, got one that does");
  const at::Tensor memory = at::zeros({5, 3, 32});
  EXPECT_EQ(refusal<c10::ValueError>(memory.slice(0, 0, 4), targets,
                                     {.gradient_buffer = memory.slice(0, 1, 5)}),
            name + "be logits themselves or share no memory with them, got an overlap");
  const at::Tensor workspace = at::zeros({8, 3, 32});
  EXPECT_EQ(refusal<c10::ValueError>(workspace.slice(0, 0, 4), targets,
                                     {.gradient_buffer = workspace.slice(0, 4, 8)}),
            "no error");
}

TEST(TokenLogps, IdsAreChecked) {
  const at::Tensor logits = at::zeros({2, 3, 32});
  for (int64_t id : {int64_t{32}, int64_t{-1}, int64_t{1} << 40}) {
    at::Tensor targets = at::zeros({2, 3}, at::kLong);
    targets[1][2] = id;
    EXPECT_EQ(refusal<c10::IndexError>(logits, targets),
              "token_logps: targets must be in [0, 32) or ignore_index -100, got " +
                  std::to_string(id) + " at [1, 2]");
    EXPECT_EQ(refusal<c10::IndexError>(logits, targets, {.row = {.ignore_index = id}}), "no error");
  }
  EXPECT_EQ(refusal<c10::IndexError>(at::zeros({4}), at::full({}, 9, at::kLong)),
            "token_logps: targets must be in [0, 4) or ignore_index -100, got 9 at []");
}

TEST(TokenLogps, TemperatureIsChecked) {
  const at::Tensor logits = at::zeros({4, 32}), targets = at::zeros({4}, at::kLong);
  for (const auto& [temperature, shown] :
       {std::pair{0.0, "0"}, {-1.0, "-1"}, {kNan, "nan"}, {kInfinity, "inf"}}) {
    EXPECT_EQ(refusal<c10::ValueError>(logits, targets, {.row = {.temperature = temperature}}),
              "token_logps: temperature must be in [1e-06, 1e+06], got " + std::string(shown));
  }
}

}  // namespace
}  // namespace tether
