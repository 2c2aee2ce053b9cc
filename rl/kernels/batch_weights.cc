#include "rl/kernels/batch_weights.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <string>
#include <utility>

#include "core/active_tokens.h"
#include "core/check.h"
#include "core/fields.h"
#include "rl/batch_weight_catalogue.h"
#include "rl/kernels/turns.h"

namespace tether {
namespace {

// A larger number counts as this: products of two stay finite, so that ranks are ranks.
constexpr double kLargest = 1e150;

// The numbers of active tokens of one array, behind those that are there. False: one is not finite.
bool append(const BatchWeightArrays& batch, const ConstArray& array, int64_t row,
            std::vector<double>& out) {
  bool finite = true;
  const auto add = [&](double, double x) {
    finite &= std::isfinite(x);
    out.push_back(std::clamp(x, -kLargest, kLargest));
  };
  for_each_active(batch.layout, row, batch.response_mask, add, array);
  return finite;
}

// Where the turns of a row end among its active tokens, of which there are `end` before.
void append_turns(const BatchWeightArrays& batch, int64_t row, size_t end,
                  std::vector<size_t>& ends) {
  const RowLayout& layout = batch.layout;
  const TurnMarks marks{batch.turn_ids, batch.response_mask, /*ascend=*/false};
  TurnScan<double> turns(marks, layout);
  size_t begin = end;
  const auto close = [&] {
    if (end > begin) ends.push_back(end);
    begin = end;
  };
  alignas(64) double weight[kBlock];
  for (int64_t column = 0; column < layout.length(row); column += kBlock) {
    const Place place = Place::at(layout, row, column);
    load_block<double>(layout, batch.response_mask, row, column, place.count, nullptr, weight);
    int next = 0;
    const auto pass = [&](int to) {
      for (; next < to; ++next) end += weight[next] != 0;
    };
    turns.for_each_begin(place, weight, [&](int i) {
      pass(i);
      close();
    });
    pass(place.count);
  }
  close();
}

// The tokens, and whether every number is finite.
std::pair<BatchTokens, bool> tokens_of(const BatchWeightArrays& batch, const BatchNeeds& needs) {
  BatchTokens out;
  bool finite = true;
  for (int64_t row = 0; row < batch.layout.rows; ++row) {
    const auto add = [&](bool needed, const ConstArray& array, std::vector<double>& column) {
      if (needed) finite &= append(batch, array, row, column);
    };
    add(true, batch.response_mask, out.weight);
    add(needs.logps, batch.logps, out.logp);
    add(needs.old_logps, batch.old_logps, out.old_logp);
    add(needs.rollout_logps, batch.rollout_logps, out.rollout_logp);
    add(needs.advantages, batch.advantages, out.advantage);
    add(needs.entropies, batch.entropies, out.entropy);
    const size_t begin = out.row_ends.empty() ? 0 : out.row_ends.back();
    if (needs.turns) append_turns(batch, row, begin, out.turn_ends);
    if (out.size() > begin) out.row_ends.push_back(out.size());
  }
  return {std::move(out), finite};
}

void scatter(const BatchWeightArrays& batch, const std::vector<double>& weights,
             const MutableArray& out) {
  size_t next = 0;
  double weight[kBlock], value[kBlock];
  for (int64_t row = 0; row < batch.layout.rows; ++row) {
    const int64_t length = batch.layout.length(row);
    for (int64_t column = 0; column < length; column += kBlock) {
      const int count = static_cast<int>(std::min<int64_t>(kBlock, length - column));
      load_block<double>(batch.layout, batch.response_mask, row, column, count, nullptr, weight);
      for (int i = 0; i < count; ++i) value[i] = weight[i] == 0 ? 1 : weights[next++];
      store_block(batch.layout, out, row, column, count, value);
    }
  }
}

void check_options(std::string_view function, const BatchWeight& rule) {
  double low = -infinity, high = infinity;
  rule.for_each_field([&](std::string_view name, double value, const Range& range) {
    check_range(function, name, value, range);
    if (name == "low") low = value;
    if (name == "high") high = value;
    require(name != "seed" || value == std::floor(value), [&] {
      return named(function, "seed") + " must be a whole number, got " + text(value);
    });
  });
  require(low <= high, [&] {
    return named(function, "low") + " must be at most high " + text(high) + ", got " + text(low);
  });
}

}  // namespace

void check_needs(std::string_view function, const BatchWeightInputs<bool>& given,
                 const BatchWeight& rule) {
  const auto check = [&](bool needed, bool is_given, std::string_view array) {
    require(!needed || is_given, [&] {
      const size_t index = chosen(rule);
      const std::string_view name =
          index < kBatchWeightNames.size() ? kBatchWeightNames[index] : "this rule";
      return named(function, array) + " must be given for " + std::string(name) + ", got none";
    });
  };
  const BatchNeeds needs = rule.needs();
  check(needs.old_logps, given.old_logps, "old_logps");
  check(needs.rollout_logps, given.rollout_logps, "rollout_logps");
  check(needs.advantages, given.advantages, "advantages");
  check(needs.entropies, given.entropies, "entropies");
  check_options(function, rule);
}

void batch_weights(std::string_view function, const BatchWeightArrays& batch,
                   const BatchWeight& rule, const MutableArray& out) {
  check_inputs(function, batch);
  check_needs(function, presence_of(batch), rule);
  check_weights(function, batch.layout, batch.response_mask);
  if (rule.needs().turns && batch.turn_ids) {
    check_ascending(function, "turn_ids", batch.layout, batch.turn_ids, batch.response_mask);
  }
  const auto [tokens, finite] = tokens_of(batch, rule.needs());
  std::vector<double> weights(tokens.size(), 1);
  if (finite) {
    rule.fill(tokens, weights);
  } else {
    std::fill(weights.begin(), weights.end(), std::numeric_limits<double>::quiet_NaN());
  }
  scatter(batch, weights, out);
}

BatchWeight batch_weight_rule(std::string_view name) {
  BatchWeightOptions out;
  set_choice("batch_weights", out, "rule", std::string(name));
  return out.rule;
}

}  // namespace tether
