#include <cuda_runtime_api.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "rl/catalogue.h"
#include "rl/kernels/preference_loss_cuda.h"
#include "rl/kernels/value_loss_cuda.h"
#include "tests/error_message.h"

namespace tether {
namespace {

struct OwnValue {
  template <class Number>
  TETHER_FORMULA Number operator()(const ValueToken<Number>& token) const {
    return token.value - token.target;
  }
};
struct OwnPair {
  template <class Number>
  TETHER_FORMULA Number operator()(const Pair<Number>& pair) const {
    return -pair.margin();
  }
};
struct OwnLink {
  template <class Number>
  TETHER_FORMULA Number operator()(const Number& score) const {
    return score * 2;
  }
};

// Tokens whose memory nobody reads: what the doors refuse before anything is launched.
struct Unread {
  float number = 0;
  double workspace[400] = {}, counts[2] = {};
  ConstArray array{&number, DType::float32, 4, 1};
  ValueArrays values{.layout = {.rows = 2, .columns = 4},
                     .values = array,
                     .returns = array,
                     .response_mask = array};
  PreferenceArrays pairs{.layout = {.rows = 2, .columns = 4},
                         .logps = array,
                         .ref_logps = array,
                         .response_mask = array};

  std::string value(const ValueObjective& objective, const MutableArray& dvalues = {}) {
    ValueTotals totals;
    return message([&] {
      cuda::value_loss(values, objective, counts, 1, dvalues, &totals, workspace, nullptr);
    });
  }
  std::string preference(const PreferenceObjective& objective) {
    PreferenceTotals totals;
    return message([&] {
      cuda::preference_loss(pairs, objective, counts, 1, {}, &totals, workspace, nullptr);
    });
  }
};

TEST(CudaValueLoss, RefusesWhatHasNoKernelAndWhatIsMissing) {
  Unread unread;
  EXPECT_EQ(
      unread.value({.loss = OwnValue{}}),
      "value_loss: objective must be one of the catalogue on a CUDA device, got another type");
  EXPECT_EQ(unread.value({.loss = ClippedSquaredError{.clip_range = -1}}),
            "value_loss: clip_range must be at least 0, got -1");
  EXPECT_EQ(unread.value({}, {&unread.number, DType::float64, 4, 1}),
            "value_loss: dvalues must be float32, bfloat16 or float16 on a CUDA device, got "
            "float64");
  unread.values.returns = {};
  EXPECT_EQ(unread.value({}), "value_loss: returns must be given, got none");
  EXPECT_EQ(
      message([&] { cuda::value_counts(unread.values, unread.counts, unread.workspace, nullptr); }),
      "value_counts: returns must be given, got none");
}

TEST(CudaPreferenceLoss, RefusesWhatHasNoKernelAndWhatIsMissing) {
  Unread unread;
  EXPECT_EQ(unread.preference({.loss = OwnPair{}}),
            "preference_loss: objective must be one of the catalogue on a CUDA device, got another "
            "type");
  EXPECT_EQ(
      unread.preference({.link = OwnLink{}, .loss = LogisticPair{}}),
      "preference_loss: link must be one of the catalogue on a CUDA device, got another type");
  EXPECT_EQ(unread.preference(presets::kto()),
            "preference_loss: labels must be given, got none. The loss is one of single answers");
  unread.pairs.layout.rows = 3;
  EXPECT_EQ(unread.preference(presets::dpo()),
            "preference_loss: logps must have an even number of rows, chosen answers before "
            "rejected ones, got 3");
  unread.pairs.layout.rows = 2;
  unread.pairs.ref_logps = {};
  EXPECT_EQ(unread.preference(presets::dpo()),
            "preference_loss: ref_logps must be given, got none. Pass them or reference = false");
  unread.pairs.logps.dtype = DType::float64;
  EXPECT_EQ(message([&] {
              cuda::preference_counts(unread.pairs, unread.counts, unread.workspace, nullptr);
            }),
            "preference_counts: logps must be float32, bfloat16 or float16 on a CUDA device, got "
            "float64");
}

TEST(CudaLosses, SayWhatHasAKernel) {
  Unread unread;
  EXPECT_TRUE(cuda::is_supported(unread.values, {}));
  EXPECT_FALSE(cuda::is_supported(unread.values, {.loss = OwnValue{}}));
  EXPECT_TRUE(cuda::is_supported(unread.pairs, presets::dpo()));
  EXPECT_FALSE(cuda::is_supported(unread.pairs, {.loss = OwnPair{}}));
  EXPECT_FALSE(cuda::is_supported(unread.pairs, {.link = OwnLink{}, .loss = LogisticPair{}}));
  unread.values.returns.dtype = unread.pairs.ref_logps.dtype = DType::float64;
  EXPECT_FALSE(cuda::is_supported(unread.values, {}));
  EXPECT_FALSE(cuda::is_supported(unread.pairs, presets::dpo()));
}

TEST(CudaLosses, EveryObjectiveGetsAsFarAsTheLaunch) {
  int devices = 0;
  if (cudaGetDeviceCount(&devices) == cudaSuccess) GTEST_SKIP() << "there is a device";
  Unread unread;
  for (const auto& row : kValueCatalogue) {
    EXPECT_THAT(unread.value(row.preset()),
                testing::StartsWith("value_loss: CUDA must accept the launch, got "));
  }
  for (const auto& row : kPreferenceCatalogue) {
    const PreferenceObjective objective = row.preset();
    unread.pairs.labels = objective.loss.takes_labels() ? unread.array : ConstArray{};
    EXPECT_THAT(unread.preference(objective),
                testing::StartsWith("preference_loss: CUDA must accept the launch, got "))
        << row.name;
  }
}

TEST(CudaLosses, WorkspacesAreOfRows) {
  const Unread unread;
  EXPECT_EQ(cuda::value_workspace_bytes(unread.values), 8 * (2 + 2 * 10));
  EXPECT_EQ(cuda::preference_workspace_bytes(unread.pairs), 8 * (2 + 2 * (6 + 2)));
}

}  // namespace
}  // namespace tether
