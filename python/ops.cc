// The operators of the losses, on torch's stable ABI: one binary for every Python and every torch
// from the target version on. Checks with the user's words are in Python (python/tether); here are
// those that need the numbers, and those that keep a direct call inside its memory.
//
// Errors leave as std::invalid_argument, which torch hands to Python as ValueError.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <string>
#include <tuple>
#include <vector>

#include "python/estimator_functions.h"
#include "python/functions.h"
#include "python/loss_functions.h"
#include "python/row_functions.h"
#include "python/stable.h"
#include "rl/dialects.h"
#include "rl/kernels/chunked_policy_loss.h"

namespace tether {
namespace {

using namespace python;

// Every function whose operator comes from its lists.
template <class Visit>
void for_each_function(Visit visit) {
  visit.template operator()<PolicyLossFunction>();
  visit.template operator()<LocalCountsFunction>();
  visit.template operator()<PreferenceLossFunction>();
  visit.template operator()<ValueLossFunction>();
  visit.template operator()<AdvantageFunction>();
  visit.template operator()<GroupFunction>();
  visit.template operator()<MomentsFunction>();
  visit.template operator()<WhitenFunction>();
  visit.template operator()<KlReportFunction>();
  visit.template operator()<BatchWeightsFunction>();
  visit.template operator()<MismatchReportFunction>();
}

// Throws unless the options are legal and what they need of the arrays is given: for devices
// without a kernel.
bool check_settings(const Name& function, const Name& name, const std::vector<Name>& given,
                    int64_t rows, const std::vector<Name>& option_names,
                    const Tensor& option_values, const std::vector<Name>& choice_names,
                    const std::vector<Name>& choice_values) {
  return with_public_errors([&] {
    const Words words{option_names, option_values, choice_names, choice_values};
    for_each_function([&]<class Function>() {
      if (name.text == Function::kName) {
        Operator<Function>::check(function.text, given, rows, words);
      }
    });
    return true;
  });
}

// Adds {"row": [...], options} to a list.
template <class Options>
void add_row(std::string& list, std::initializer_list<std::string> row, Options options) {
  append_json(list, "{\"row\": " + json_list(row) + ", " + json_of_options(options) + "}");
}

std::string functions_json() {
  std::string out;
  const auto add = [&]<class Function>() { append_json(out, json_of_function<Function>()); };
  for_each_function(add);
  for_each_row_function(add);
  return out;
}

std::string objectives_json() {
  std::string out;
  const auto add = [&](std::string_view family, const auto& rows) {
    for (const auto& row : rows) {
      add_row(out,
              {json_text(family), json_text(row.name), json_text(row.formula), json_text(row.paper),
               json_text(row.agreement)},
              row.preset());
    }
  };
  add("policy", kCatalogue);
  add("preference", kPreferenceCatalogue);
  add("value", kValueCatalogue);
  return out;
}

std::string dialects_json() {
  std::string out;
  for (const Dialect& each : kDialects) {
    std::string settings;
    for (const Setting& setting : settings_of(each)) {
      append_json(settings, json_list({json_text(setting.name), json_text(setting.value)}));
    }
    append_json(
        out, json_list({json_text(each.name), json_text(each.objective), in_brackets(settings)}));
  }
  return out;
}

std::string weights_json() {
  std::string out;
  for_each_weight([&](const auto& row) {
    const WeightFormula formula = row.defaults;
    add_row(out,
            {json_text(row.name), json_text(row.formula), json_text(row.paper),
             formula.traits().leaves ? "true" : "false",
             formula.traits().reads_policy ? "true" : "false",
             json_text(rule_of(formula.level()).name)},
            formula);
  });
  return out;
}

std::string advantages_json() {
  std::string out;
  const auto add = [&](std::string_view function, const auto& row) {
    add_row(out,
            {json_text(function), json_text(row.name), json_text(row.formula), json_text(row.paper),
             json_text(row.agreement)},
            row.defaults);
  };
  for_each_recursion([&](const auto& row) { add(AdvantageFunction::kName, row); });
  for_each_group_rule([&](const auto& row) { add(GroupFunction::kName, row); });
  return out;
}

std::string batch_weights_json() {
  std::string out;
  for_each_batch_weight([&](const auto& row) {
    add_row(out,
            {json_text(row.name), json_text(row.formula), json_text(row.paper),
             json_text(row.agreement)},
            BatchWeight(row.defaults));
  });
  return out;
}

std::string links_json() {
  std::string out;
  for_each_link([&](const auto& row) {
    out += (out.empty() ? "{" : ", {") + json_of_options(Link(row.defaults)) + "}";
  });
  return out;
}

// {"functions": {name: ...}, "objectives": [...], ...}, what Python reads once.
std::vector<std::string> description() {
  return {"{\"functions\": {" + functions_json() + "}, \"objectives\": [" + objectives_json() +
          "], \"dialects\": [" + dialects_json() + "], \"weights\": [" + weights_json() +
          "], \"batch_weights\": [" + batch_weights_json() + "], \"advantages\": [" +
          advantages_json() + "], \"links\": [" + links_json() + "]}"};
}

// ---- metrics: the values of to_map of a block, in the order of the names
// -------------------------

Tensor policy_metrics(const Tensor& sums, const Tensor& maxima) {
  return with_public_errors([&] {
    PolicyMetrics metrics;
    fill("policy_metrics", "sums", sums, metrics.sums);
    fill("policy_metrics", "maxima", maxima, metrics.maxima);
    return values_of(metrics.to_map());
  });
}

Tensor preference_metrics(const Tensor& sums) {
  return with_public_errors([&] {
    PreferenceMetrics metrics;
    fill("preference_metrics", "sums", sums, metrics.sums);
    return values_of(metrics.to_map());
  });
}

Tensor value_metrics(const Tensor& sums) {
  return with_public_errors([&] {
    ValueMetrics metrics;
    fill("value_metrics", "sums", sums, metrics.sums);
    return values_of(metrics.to_map());
  });
}

std::vector<std::string> metric_names(const Name& family) {
  if (family.text == "policy") return names_of(PolicyMetrics{}.to_map());
  if (family.text == "preference") return names_of(PreferenceMetrics{}.to_map());
  return names_of(ValueMetrics{}.to_map());
}

}  // namespace
}  // namespace tether

STABLE_TORCH_LIBRARY(tether, library) {
  tether::for_each_function(
      [&]<class Function>() { library.def(tether::python::Operator<Function>::schema().c_str()); });
  library.def(
      "check_settings(str function, str name, str[] given, int rows, str[] option_names, "
      "Tensor option_values, str[] choice_names, str[] choice_values) -> bool");
  library.def("description() -> str[]");
  library.def("policy_metrics(Tensor sums, Tensor maxima) -> Tensor");
  library.def("preference_metrics(Tensor sums) -> Tensor");
  library.def("value_metrics(Tensor sums) -> Tensor");
  library.def("metric_names(str family) -> str[]");
}

STABLE_TORCH_LIBRARY_IMPL(tether, CPU, library) {
  tether::for_each_function([&]<class Function>() {
    library.impl(std::string(Function::kName).c_str(), &tether::python::Operator<Function>::boxed);
  });
  library.impl("policy_metrics", TORCH_BOX(&tether::policy_metrics));
  library.impl("preference_metrics", TORCH_BOX(&tether::preference_metrics));
  library.impl("value_metrics", TORCH_BOX(&tether::value_metrics));
}

STABLE_TORCH_LIBRARY_IMPL(tether, CompositeExplicitAutograd, library) {
  library.impl("check_settings", TORCH_BOX(&tether::check_settings));
  library.impl("description", TORCH_BOX(&tether::description));
  library.impl("metric_names", TORCH_BOX(&tether::metric_names));
}
