#include "rl/policy/top_entropy.h"

#include "tests/rl/policy/batch_tokens.h"

namespace tether {
namespace {

using ::testing::ElementsAre;

TEST(TopEntropy, KeepsTheTokensAboveTheQuantile) {
  const BatchTokens tokens{.logp = {0, 0, 0, 0, 0}, .entropy = {0.5, 3, 1, 2, 0}};
  // The quantiles 0.6 and 0.7 are at places 2.4 and 2.8 of 0, 0.5, 1, 2, 3: 1.4 and 1.8.
  EXPECT_THAT(weights_by(TopEntropy{.share = 0.4}, tokens), ElementsAre(0, 1, 0, 1, 0));
  EXPECT_THAT(weights_by(TopEntropy{.share = 0.3}, tokens), ElementsAre(0, 1, 0, 1, 0));
  // At 0.5 it is a token's own, which is kept.
  EXPECT_THAT(weights_by(TopEntropy{.share = 0.5}, tokens), ElementsAre(0, 1, 1, 1, 0));
  EXPECT_THAT(weights_by(TopEntropy{.share = 0}, tokens), ElementsAre(0, 1, 0, 0, 0));
  EXPECT_THAT(weights_by(TopEntropy{.share = 1}, tokens), ElementsAre(1, 1, 1, 1, 1));
}

}  // namespace
}  // namespace tether
