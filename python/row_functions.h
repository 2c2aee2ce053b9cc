#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "logits/inputs.h"
#include "logits/pair_kl.h"
#include "logits/rows.h"
#include "logits/top_k_kl.h"
#include "python/functions.h"

// The functions on rows of logits, as far as their lists go: their operators are written out, since
// autograd of theirs saves more than a gradient.

namespace tether::python {

// A whole number among the options, which are doubles.
inline constexpr Range kWhole{-0x1p53, 0x1p53};

struct RowCall {
  RowOptions row = {};
  double ignore_index = -100, first_id = 0, ids = 0;
  bool entropies = false, statistics = false;

  RowOptions options() const {
    RowOptions out = row;
    out.ignore_index = static_cast<int64_t>(ignore_index);
    out.first_id = static_cast<int64_t>(first_id);
    out.ids = static_cast<int64_t>(ids);
    out.sums = statistics ? RowSums::all : entropies ? RowSums::entropy : RowSums::logp;
    return out;
  }
};

template <class Visit>
void for_each_option(RowCall& call, Visit visit) {
  for_each_field(call.row, visit);
  visit("ignore_index", call.ignore_index, kWhole);
  visit("first_id", call.first_id, kWhole);
  visit("ids", call.ids, kWhole);
}
template <class Visit>
void for_each_choice(RowCall& call, Visit visit) {
  visit("entropies", call.entropies, kBoolNames);
  visit("statistics", call.statistics, kBoolNames);
}

struct TopKCall {
  TopKKlOptions rule = {};
  double ignore_index = -100;

  TopKKlOptions options() const {
    TopKKlOptions out = rule;
    out.ignore_index = static_cast<int64_t>(ignore_index);
    return out;
  }
};

template <class Visit>
void for_each_option(TopKCall& call, Visit visit) {
  for_each_field(call.rule, visit);
  visit("ignore_index", call.ignore_index, kWhole);
}
template <class Visit>
void for_each_choice(TopKCall& call, Visit visit) {
  tether::for_each_choice(call.rule, visit);
}

// What needs the temperature of rows alone.
struct TemperatureCall {
  double temperature = 1;

  static constexpr auto fields() {
    return std::tuple{field("temperature", &TemperatureCall::temperature, {1e-6, 1e6})};
  }
};

struct RowFunction {
  static constexpr bool kGradient = false;
  static constexpr std::array<Result, 0> kResults{};
};

struct TokenLogpsFunction : RowFunction {
  template <class Array>
  using Inputs = TokenLogpsInputs<Array>;
  using Options = RowCall;
  static constexpr std::string_view kName = "token_logps";
};

struct LinearLogpsFunction : RowFunction {
  template <class Array>
  using Inputs = LinearLogpsInputs<Array>;
  using Options = RowCall;
  static constexpr std::string_view kName = "linear_token_logps";
};

struct CategoricalKlFunction : RowFunction {
  template <class Array>
  using Inputs = CategoricalKlInputs<Array>;
  using Options = TemperatureCall;
  static constexpr std::string_view kName = "categorical_kl";
};

struct TopKKlFunction : RowFunction {
  template <class Array>
  using Inputs = TopKKlInputs<Array>;
  using Options = TopKCall;
  static constexpr std::string_view kName = "top_k_kl";
};

struct HeadLogpsFunction : RowFunction {
  template <class Array>
  using Inputs = HeadLogpsInputs<Array>;
  using Options = TemperatureCall;
  static constexpr std::string_view kName = "head_logps";
};

template <class Visit>
void for_each_row_function(Visit visit) {
  visit.template operator()<TokenLogpsFunction>();
  visit.template operator()<LinearLogpsFunction>();
  visit.template operator()<CategoricalKlFunction>();
  visit.template operator()<TopKKlFunction>();
  visit.template operator()<HeadLogpsFunction>();
}

}  // namespace tether::python
