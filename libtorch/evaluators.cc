#include "libtorch/evaluators.h"

#include "core/type_table.h"
#include "libtorch/arrays.h"
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
auto& pair_losses() {
  static auto& table =
      new_table<PairLoss, TensorPair>([](auto visit) { for_each_pair_loss(visit); });
  return table;
}

}  // namespace

void detail::add_evaluator(std::type_index formula, SurrogateEvaluator evaluator) {
  surrogates().add(formula, evaluator);
}
void detail::add_evaluator(std::type_index formula, PairLossEvaluator evaluator) {
  pair_losses().add(formula, evaluator);
}

at::Tensor detail::on_tensors(const Surrogate& surrogate, const TensorToken& token) {
  const auto evaluator = surrogates().find(surrogate.type());
  check_value(evaluator.has_value(),
              "policy_loss: surrogate must be one of the library's or wrapped by on_any_device on "
              "devices other than the CPU, got another type");
  return (*evaluator)(surrogate, token);
}

at::Tensor detail::on_tensors(const PairLoss& loss, const TensorPair& pair) {
  const auto evaluator = pair_losses().find(loss.type());
  check_value(evaluator.has_value(),
              "preference_loss: loss must be one of the library's or wrapped by on_any_device on "
              "devices other than the CPU, got another type");
  return (*evaluator)(loss, pair);
}

}  // namespace tether
