#include "rl/kernels/batch_weights.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <string>
#include <utility>

#include "core/check.h"
#include "core/fields.h"
#include "rl/batch_weight_catalogue.h"

namespace tether {
namespace {

// A larger number counts as this: products of two stay finite, so that ranks are ranks.
constexpr double kLargest = 1e150;

int64_t id_at(const BatchWeightArrays& batch, int64_t row, int64_t column) {
  const ConstArray& ids = batch.turn_ids;
  const int64_t at = ids.index(batch.layout, row, column);
  return ids.dtype == DType::int32 ? static_cast<const int32_t*>(ids.data)[at]
                                   : static_cast<const int64_t*>(ids.data)[at];
}

// The numbers of active tokens of one array, behind those that are there. False: one is not finite.
bool append(const BatchWeightArrays& batch, const ConstArray& array, int64_t row,
            std::vector<double>& out) {
  bool finite = true;
  double weight[kBlock], value[kBlock];
  const int64_t length = batch.layout.length(row);
  for (int64_t column = 0; column < length; column += kBlock) {
    const int count = static_cast<int>(std::min<int64_t>(kBlock, length - column));
    load_block<double>(batch.layout, batch.response_mask, row, column, count, nullptr, weight);
    load_block<double>(batch.layout, array, row, column, count, weight, value);
    for (int i = 0; i < count; ++i) {
      if (weight[i] == 0) continue;
      finite &= std::isfinite(value[i]);
      out.push_back(std::clamp(value[i], -kLargest, kLargest));
    }
  }
  return finite;
}

// Where the turns of a row end among its active tokens, of which there are `begin` before.
void append_turns(const BatchWeightArrays& batch, int64_t row, size_t begin,
                  std::vector<size_t>& ends) {
  double weight[kBlock];
  const int64_t length = batch.layout.length(row);
  int64_t last = 0;
  bool inside = false;
  size_t end = begin;
  for (int64_t column = 0; column < length; column += kBlock) {
    const int count = static_cast<int>(std::min<int64_t>(kBlock, length - column));
    load_block<double>(batch.layout, batch.response_mask, row, column, count, nullptr, weight);
    for (int i = 0; i < count; ++i) {
      if (weight[i] == 0) {
        inside &= bool(batch.turn_ids);
        continue;
      }
      const int64_t id = batch.turn_ids ? id_at(batch, row, column + i) : 0;
      if (end > begin && (!inside || id != last)) ends.push_back(end);
      inside = true;
      last = id;
      ++end;
    }
  }
  if (end > begin) ends.push_back(end);
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
  const BatchNeeds& needs = rule.needs();
  check(needs.old_logps, given.old_logps, "old_logps");
  check(needs.rollout_logps, given.rollout_logps, "rollout_logps");
  check(needs.advantages, given.advantages, "advantages");
  check(needs.entropies, given.entropies, "entropies");
}

void batch_weights(std::string_view function, const BatchWeightArrays& batch,
                   const BatchWeight& rule, const MutableArray& out) {
  check_inputs(function, batch);
  check_needs(function, presence_of(batch), rule);
  check_weights(function, batch.layout, batch.response_mask);
  check_options(function, rule);
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
