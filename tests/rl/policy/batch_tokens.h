#pragma once

#include <gmock/gmock.h>

#include <vector>

#include "rl/batch_weight.h"

namespace tether {

// The weights of tokens by a rule.
template <class Rule>
std::vector<double> weights_by(const Rule& rule, BatchTokens tokens) {
  if (tokens.weight.empty()) tokens.weight.assign(tokens.logp.size(), 1);
  if (tokens.row_ends.empty()) tokens.row_ends = {tokens.weight.size()};
  std::vector<double> out(tokens.weight.size(), 1);
  rule(tokens, out);
  return out;
}

}  // namespace tether
