// The GRPO loss of two answers of three tokens, over raw memory, beside headers of the same names.
#include <rl/kernels/policy_loss.h>
#include <rl/policy/grpo.h>

#include <iostream>

#include "core/check.h"
#include "core/number.h"
#include "rl/token.h"

static_assert(kOwnCheck && kOwnNumber && kOwnToken);

int main() {
  constexpr int kRows = 2, kTokens = 3;
  const float logps[] = {-1, -1, -1, -1, -1, -1};
  const float old_logps[] = {-1.1f, -1.1f, -1.1f, -1.1f, -1.1f, -1.1f};
  const float ref_logps[] = {-0.9f, -0.9f, -0.9f, -0.9f, -0.9f, -0.9f};
  const float advantages[] = {1, -0.5f};
  const bool response_mask[] = {true, true, true, true, true, true};
  float dlogps[kRows * kTokens];

  const auto tokens = [](const auto* data, tether::DType dtype) {
    return tether::ConstArray{.data = data, .dtype = dtype, .row_stride = kTokens};
  };
  const auto kFloat = tether::DType::float32;
  const tether::PolicyArrays batch{
      .layout = {.rows = kRows, .columns = kTokens},
      .logps = tokens(logps, kFloat),
      .advantages = {.data = advantages, .dtype = kFloat, .row_stride = 1, .per_row = true},
      .response_mask = tokens(response_mask, tether::DType::boolean),
      .old_logps = tokens(old_logps, kFloat),
      .ref_logps = tokens(ref_logps, kFloat),
  };
  const tether::MutableArray gradient{.data = dlogps, .dtype = kFloat, .row_stride = kTokens};
  const tether::PolicyTotals totals =
      tether::policy_loss(batch, tether::presets::grpo(/*beta=*/0.04), {}, {.logps = gradient});
  std::cout << "loss " << totals.loss << "\ngradient";
  for (const float slot : dlogps) std::cout << ' ' << slot;
  std::cout << '\n';
}
