#include "libtorch/response_targets.h"

#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "libtorch/token_logps.h"

namespace tether {
namespace {

at::Tensor rows(const std::vector<std::vector<int64_t>>& values) {
  std::vector<at::Tensor> tensors;
  for (const auto& row : values) tensors.push_back(at::tensor(row));
  return at::stack(tensors);
}

at::Tensor mask(const std::vector<std::vector<int64_t>>& values) {
  return rows(values).to(at::kBool);
}

void expect_equal(const at::Tensor& got, const at::Tensor& want) {
  EXPECT_EQ(got.scalar_type(), want.scalar_type());
  EXPECT_TRUE(at::equal(got, want)) << got << "\nwant\n" << want;
}

// The pictures of the header: a prompt of 2 (rows 0 and 2) or 3 tokens, a response of 3.
TEST(ResponseTargets, RightPadded) {
  const auto out = response_targets(rows({{10, 11, 20, 21, 22, 0}, {10, 11, 12, 20, 21, 22}}),
                                    at::tensor({2, 3}, at::kLong),
                                    rows({{1, 1, 1, 1, 1, 0}, {1, 1, 1, 1, 1, 1}}));
  expect_equal(out.targets, rows({{11, 20, 21, 22, 0}, {11, 12, 20, 21, 22}}));
  expect_equal(out.response_mask, mask({{0, 1, 1, 1, 0}, {0, 0, 1, 1, 1}}));
}

TEST(ResponseTargets, LeftPadded) {
  const auto out = response_targets(rows({{0, 10, 11, 20, 21, 22}, {0, 0, 0, 10, 20, 0}}),
                                    at::tensor({2, 1}, at::kLong),
                                    mask({{0, 1, 1, 1, 1, 1}, {0, 0, 0, 1, 1, 0}}));
  expect_equal(out.targets, rows({{10, 11, 20, 21, 22}, {0, 0, 10, 20, 0}}));
  expect_equal(out.response_mask, mask({{0, 0, 1, 1, 1}, {0, 0, 0, 1, 0}}));
}

TEST(ResponseTargets, WithoutAttentionMaskAllAfterThePromptIsResponse) {
  const auto out = response_targets(rows({{5, 6, 7, 8}, {5, 6, 7, 8}, {5, 6, 7, 8}}).to(at::kInt),
                                    at::tensor({1, 3, 4}, at::kInt));
  expect_equal(out.targets, rows({{6, 7, 8}, {6, 7, 8}, {6, 7, 8}}));
  expect_equal(out.response_mask, mask({{1, 1, 1}, {0, 0, 1}, {0, 0, 0}}));
}

TEST(ResponseTargets, EdgesOfTheShape) {
  EXPECT_EQ(response_targets(rows({{5}, {6}}), at::ones({2}, at::kLong)).targets.sizes(),
            (std::vector<int64_t>{2, 0}));
  EXPECT_EQ(response_targets(at::zeros({0, 4}, at::kLong), at::ones({0}, at::kLong))
                .response_mask.sizes(),
            (std::vector<int64_t>{0, 3}));
  const auto empty =
      response_targets(rows({{0, 0, 0}}), at::ones({1}, at::kLong), mask({{0, 0, 0}}));
  expect_equal(empty.response_mask, mask({{0, 0}}));
}

TEST(ResponseTargets, NumberOfResponseTokensIsKept) {
  at::manual_seed(1);
  const int64_t length = 9;
  for (int64_t left = 0; left < 3; ++left) {
    for (int64_t prompt = 1; prompt < 4; ++prompt) {
      for (int64_t response = 0; left + prompt + response <= length; ++response) {
        at::Tensor attended = at::zeros({1, length}, at::kLong);
        attended.slice(1, left, left + prompt + response).fill_(1);
        const at::Tensor ids = at::randint(100, {1, length}, at::kLong);
        const auto out = response_targets(ids, at::full({1}, prompt, at::kLong), attended);
        EXPECT_TRUE(at::equal(out.targets.masked_select(out.response_mask),
                              ids[0].slice(0, left + prompt, left + prompt + response)));
      }
    }
  }
}

// What the two functions are for: logps of the response, whatever stands elsewhere.
TEST(ResponseTargets, FeedTokenLogps) {
  at::manual_seed(2);
  const at::Tensor ids = at::randint(20, {2, 7}, at::kLong);
  const auto [targets, response_mask] = response_targets(ids, at::tensor({2, 4}, at::kLong));
  at::Tensor logits = at::randn({2, 7, 20});
  const at::Tensor log_p = at::log_softmax(logits.to(at::kDouble), -1);
  const at::Tensor only_response = targets.masked_fill(response_mask.logical_not(), -100);
  const at::Tensor logps = token_logps(logits.slice(1, 0, -1), only_response).logps;
  for (int64_t row = 0; row < 2; ++row) {
    for (int64_t t = 0; t < 6; ++t) {
      const bool in_response = t + 1 >= (row == 0 ? 2 : 4);
      const double want =
          in_response ? log_p[row][t][ids[row][t + 1].item<int64_t>()].item<double>() : 0;
      EXPECT_NEAR(logps[row][t].item<double>(), want, 1e-6);
    }
  }
}

// ---- errors -------------------------------------------------------------------------------------

template <class Exception>
std::string refusal(const at::Tensor& input_ids, const at::Tensor& prompt_lengths,
                    const at::Tensor& attention_mask = {}) {
  try {
    response_targets(input_ids, prompt_lengths, attention_mask);
  } catch (const Exception& error) {
    return error.what_without_backtrace();
  }
  return "no error";
}

TEST(ResponseTargets, BadInputIsRefused) {
  const at::Tensor ids = at::zeros({2, 5}, at::kLong), lengths = at::ones({2}, at::kLong);
  EXPECT_EQ(refusal<c10::ValueError>(at::Tensor(), lengths),
            "response_targets: input_ids must be given, got none");
  EXPECT_EQ(refusal<c10::ValueError>(ids, at::Tensor()),
            "response_targets: prompt_lengths must be given, got none");
  EXPECT_EQ(refusal<c10::TypeError>(ids.to(at::kFloat), lengths),
            "response_targets: input_ids must be int32 or int64, got float32");
  EXPECT_EQ(refusal<c10::TypeError>(ids, lengths.to(at::kDouble)),
            "response_targets: prompt_lengths must be int32 or int64, got float64");
  EXPECT_EQ(refusal<c10::TypeError>(ids, lengths, ids.to(at::kFloat)),
            "response_targets: attention_mask must be bool or integer, got float32");
  EXPECT_EQ(refusal<c10::ValueError>(ids[0], lengths),
            "response_targets: input_ids must be [B, L] with L at least 1, got [5]");
  EXPECT_EQ(refusal<c10::ValueError>(ids.slice(1, 0, 0), lengths),
            "response_targets: input_ids must be [B, L] with L at least 1, got [2, 0]");
  EXPECT_EQ(refusal<c10::ValueError>(ids, at::ones({3}, at::kLong)),
            "response_targets: prompt_lengths must be [2] like input_ids [2, 5], got [3]");
  EXPECT_EQ(refusal<c10::ValueError>(ids, lengths, ids.slice(1, 1)),
            "response_targets: attention_mask must be [2, 5] like input_ids, got [2, 4]");
  EXPECT_EQ(refusal<c10::ValueError>(ids, lengths.to(at::kMeta)),
            "response_targets: prompt_lengths must be on cpu like input_ids, got meta");
  EXPECT_EQ(refusal<c10::ValueError>(ids, lengths, ids.to(at::kMeta)),
            "response_targets: attention_mask must be on cpu like input_ids, got meta");
  EXPECT_EQ(refusal<c10::ValueError>(ids, at::tensor({1, 6}, at::kLong)),
            "response_targets: prompt_lengths must be in [1, 5], got 6 at [1]");
  EXPECT_EQ(refusal<c10::ValueError>(ids, at::tensor({0, 1}, at::kLong)),
            "response_targets: prompt_lengths must be in [1, 5], got 0 at [0]");
}

}  // namespace
}  // namespace tether
