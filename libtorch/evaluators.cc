#include "libtorch/evaluators.h"

#include <ATen/TensorOperators.h>
#include <ATen/core/grad_mode.h>
#include <c10/core/InferenceMode.h>

#include <string>
#include <string_view>

#include "core/type_table.h"
#include "libtorch/arrays.h"
#include "libtorch/flat_batch.h"
#include "rl/catalogue.h"

namespace tether {
namespace {

template <class Any, class Input>
using Table = TypeTable<at::Tensor (*)(const Any&, const Input&)>;

// Never destroyed: formulas may run while the program ends.
template <class Any, class Input, class ForEach>
Table<Any, Input>& new_table(ForEach for_each) {
  auto& table = *new Table<Any, Input>;
  for_each([&](auto formula) {
    using Formula = decltype(formula);
    table.add(typeid(Formula), &detail::evaluate_on_tensors<Formula, Any, Input>);
  });
  return table;
}

// Made at first use: an object that entered its formulas would be dropped with its file where
// nothing else of a static library's file is called.
auto& surrogates() {
  static auto& table =
      new_table<Surrogate, TensorToken>([](auto visit) { for_each_surrogate(visit); });
  return table;
}
auto& preference_formulas() {
  static auto& table = new_table<PreferenceFormula, TensorExample>(
      [](auto visit) { for_each_preference_formula(visit); });
  return table;
}
auto& links() {
  static auto& table = new_table<Link, TensorNumber>(
      [](auto visit) { for_each_link([&](const auto& row) { visit(row.defaults); }); });
  return table;
}
auto& weights() {
  static auto& table = new_table<WeightFormula, detail::TensorWeightInput>(
      [](auto visit) { for_each_weight([&](const auto& row) { visit(row.defaults); }); });
  return table;
}

auto& value_formulas() {
  static auto& table =
      new_table<ValueFormula, TensorValueToken>([](auto visit) { for_each_value_formula(visit); });
  return table;
}
auto& kl_forms() {
  static auto& table = new_table<KlForm, detail::TensorKlInput>(
      [](auto visit) { for_each_kl_form([&](const auto& row) { visit(row.defaults); }); });
  return table;
}

template <class Any, class Input>
at::Tensor evaluated(Table<Any, Input>& table, std::string_view what, const Any& formula,
                     const Input& input) {
  const auto evaluator = table.find(formula.type());
  detail::check_value(evaluator.has_value(),
                      std::string(what) +
                          " must be one of the library's or wrapped by on_any_device on devices "
                          "other than the CPU, got another type");
  return (*evaluator)(formula, input);
}

}  // namespace

void detail::add_evaluator(std::type_index formula, SurrogateEvaluator evaluator) {
  surrogates().add(formula, evaluator);
}
void detail::add_evaluator(std::type_index formula, PreferenceEvaluator evaluator) {
  preference_formulas().add(formula, evaluator);
}
void detail::add_evaluator(std::type_index formula, LinkEvaluator evaluator) {
  links().add(formula, evaluator);
}
void detail::add_evaluator(std::type_index formula, WeightEvaluator evaluator) {
  weights().add(formula, evaluator);
}
void detail::add_evaluator(std::type_index formula, ValueEvaluator evaluator) {
  value_formulas().add(formula, evaluator);
}
void detail::add_evaluator(std::type_index formula, KlEvaluator evaluator) {
  kl_forms().add(formula, evaluator);
}

at::Tensor detail::value_plus_slope(const at::Tensor& d,
                                    const std::function<TensorNumber(const TensorNumber&)>& form) {
  const c10::InferenceMode normal(false);
  at::AutoGradMode enabled(true);
  const at::Tensor x = d.detach().clone().requires_grad_(true);
  const at::Tensor value = form({x}).value;
  return value.detach() - derivative(value.sum(), x);
}

at::Tensor detail::on_tensors(const Surrogate& surrogate, const TensorToken& token) {
  return evaluated(surrogates(), "policy_loss: surrogate", surrogate, token);
}
at::Tensor detail::on_tensors(const PreferenceFormula& loss, const TensorExample& example) {
  return evaluated(preference_formulas(), "preference_loss: loss", loss, example);
}
at::Tensor detail::on_tensors(const Link& link, const TensorNumber& score) {
  return evaluated(links(), "preference_loss: link", link, score);
}
at::Tensor detail::on_tensors(const WeightFormula& weight, const TensorWeightInput& input) {
  return evaluated(weights(), "policy_loss: weight", weight, input);
}
at::Tensor detail::on_tensors(const ValueFormula& loss, const TensorValueToken& token) {
  return evaluated(value_formulas(), "value_loss: loss", loss, token);
}
at::Tensor detail::on_tensors(const KlForm& form, const TensorKlInput& input,
                              std::string_view option) {
  return evaluated(kl_forms(), "policy_loss: " + std::string(option), form, input);
}

}  // namespace tether
