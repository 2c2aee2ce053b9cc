// The operators of the Python package, on torch's stable ABI: one binary for every Python and every
// torch from the target version on. Checks with the user's words are in Python (python/tether);
// here are those that need the numbers, and those that keep a direct call inside its memory.
//
// Errors leave as std::invalid_argument, which torch hands to Python as ValueError.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstring>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "python/stable.h"
#include "rl/catalogue.h"
#include "rl/kernels/chunked_policy_loss.h"
#include "rl/kernels/policy_loss.h"
#include "rl/kernels/preference_loss.h"

namespace tether {
namespace {

using python::contiguous;
using python::dtype_of;
using python::fill;
using python::layout_of;
using python::Name;
using python::numbers_of;
using python::same_shape;
using python::token_array;
using python::token_view;
using python::torch_executor;
using python::with_public_errors;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Names = std::vector<Name>;
using Numbers = std::vector<double>;

// ---- tensors as arrays
// ---------------------------------------------------------------------------

ConstArray like_logps(std::string_view function, std::string_view name, const Tensor& tensor,
                      const Tensor& logps) {
  return token_array(function, name, tensor, "logps", logps);
}

ConstArray advantage_array(std::string_view function, const Tensor& advantages, const Tensor& logps,
                           int64_t rows) {
  if (same_shape(advantages, logps)) return like_logps(function, "advantages", advantages, logps);
  const bool column = advantages.dim() == 2 && advantages.size(1) == 1;
  require((column || advantages.dim() == 1) && advantages.size(0) == rows, [&] {
    return std::string(function) + ": advantages must be [B, 1], [B] or of the shape of logps";
  });
  return {.data = advantages.const_data_ptr(),
          .dtype = dtype_of(function, "advantages", advantages),
          .row_stride = advantages.stride(0),
          .column_stride = 0,
          .per_row = true};
}

struct Inputs {
  const Tensor& logps;
  const Tensor& advantages;
  const Tensor& response_mask;
  std::optional<Tensor> old_logps = {};
  std::optional<Tensor> ref_logps = {};
  std::optional<Tensor> entropies = {};
  std::optional<Tensor> offsets = {};  // contiguous
};

PolicyArrays arrays_of(std::string_view function, const Inputs& in) {
  const auto tokens = [&](std::string_view name, const std::optional<Tensor>& tensor) {
    return tensor ? like_logps(function, name, *tensor, in.logps) : ConstArray{};
  };
  PolicyArrays out;
  out.layout = layout_of(function, "logps", in.logps, in.offsets);
  out.logps = like_logps(function, "logps", in.logps, in.logps);
  out.advantages = advantage_array(function, in.advantages, in.logps, out.layout.rows);
  out.response_mask = like_logps(function, "response_mask", in.response_mask, in.logps);
  out.old_logps = tokens("old_logps", in.old_logps);
  out.ref_logps = tokens("ref_logps", in.ref_logps);
  out.entropies = tokens("entropies", in.entropies);
  return out;
}

Tensor new_doubles(std::initializer_list<int64_t> sizes, const double* values) {
  Tensor out = torch::stable::empty(sizes, ScalarType::Double);
  std::copy_n(values, out.numel(), static_cast<double*>(out.mutable_data_ptr()));
  return out;
}

Tensor new_scalar(double value, ScalarType type) {
  Tensor out = torch::stable::empty({}, type);
  if (type == ScalarType::Double) {
    *static_cast<double*>(out.mutable_data_ptr()) = value;
  } else {
    *static_cast<float*>(out.mutable_data_ptr()) = static_cast<float>(value);
  }
  return out;
}

// ---- objectives by name
// --------------------------------------------------------------------------

// An objective in the words of a call. The numbers are a tensor, [options] in float64: a number
// that changes would make torch.compile compile again.
struct Wanted {
  const Name& objective;
  const Names& option_names;
  const Tensor& option_values;
  const Names& choice_names;
  const Names& choice_values;
};

// The preset with its options and choices set.
template <class Objective>
Objective adjusted(std::string_view function, Objective out, const Wanted& wanted) {
  const size_t options = wanted.option_names.size();
  const double* values = numbers_of<const double>(function, "option_values", wanted.option_values,
                                                  static_cast<int64_t>(options));
  for (size_t i = 0; i < options; ++i) {
    set_option(function, out, wanted.option_names[i].text, values[i]);
  }
  require(wanted.choice_names.size() == wanted.choice_values.size(), [&] {
    return std::string(function) + ": choice_values must be " + text(wanted.choice_names.size()) +
           " names, got " + text(wanted.choice_values.size());
  });
  for (size_t i = 0; i < wanted.choice_names.size(); ++i) {
    set_choice(function, out, wanted.choice_names[i].text, wanted.choice_values[i].text);
  }
  return out;
}

PolicyObjective objective_of(std::string_view function, const Wanted& wanted) {
  return adjusted(function, preset(function, wanted.objective.text), wanted);
}

PreferenceObjective preference_objective_of(std::string_view function, const Wanted& wanted) {
  return adjusted(function, preference_preset(function, wanted.objective.text), wanted);
}

// [policy, kl, sequences, world_size, scale] in float64, where -inf is absent.
Normalizer normalizer_of(std::string_view function, const std::optional<Tensor>& tensor) {
  if (!tensor) return {};
  const double* values = numbers_of<const double>(function, "normalizer", *tensor, 5);
  const auto given = [&](size_t i) {
    return values[i] == -infinity ? std::nullopt : std::optional(values[i]);
  };
  return {.policy = given(0),
          .kl = given(1),
          .sequences = given(2),
          .world_size = values[3],
          .scale = values[4]};
}

// ---- operators
// -----------------------------------------------------------------------------------

// Memory for the gradient of `input`; none of it unless wanted.
Tensor gradient_buffer(bool wanted, const Tensor& input, MutableArray& view) {
  if (!wanted) return torch::stable::new_empty(input, {0});
  // float16 gradients wait in float32 for the upstream gradient.
  const bool half = input.scalar_type() == ScalarType::Half;
  Tensor out = torch::stable::new_empty(input, input.sizes(),
                                        half ? std::optional(ScalarType::Float) : std::nullopt);
  view = token_view<MutableArray>("policy_loss", "logps", out, out.mutable_data_ptr());
  return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> policy_loss_forward(
    const Tensor& logps, const Tensor& advantages, const Tensor& response_mask,
    const std::optional<Tensor>& old_logps, const std::optional<Tensor>& ref_logps,
    const std::optional<Tensor>& entropies, const std::optional<Tensor>& offsets,
    const Name& objective_name, const Names& option_names, const Tensor& option_values,
    const Names& choice_names, const Names& choice_values, const std::optional<Tensor>& normalizer,
    bool with_gradient) {
  return with_public_errors([&] {
    const Inputs in{logps,     advantages, response_mask,      old_logps,
                    ref_logps, entropies,  contiguous(offsets)};
    const PolicyArrays arrays = arrays_of("policy_loss", in);
    const PolicyObjective objective = objective_of(
        "policy_loss", {objective_name, option_names, option_values, choice_names, choice_values});
    PolicyGradients gradients;
    const Tensor dlogps = gradient_buffer(with_gradient, logps, gradients.logps);
    const Tensor dentropies = gradient_buffer(with_gradient && entropies.has_value(),
                                              entropies.value_or(logps), gradients.entropies);
    const PolicyTotals totals = policy_loss(
        arrays, objective, normalizer_of("policy_loss", normalizer), gradients, torch_executor());
    const bool wide = logps.scalar_type() == ScalarType::Double;
    return std::tuple(new_scalar(totals.loss, wide ? ScalarType::Double : ScalarType::Float),
                      dlogps, dentropies,
                      new_doubles({PolicyMetrics::kSums, 2}, totals.metrics.sums.data()),
                      new_doubles({PolicyMetrics::kMaxima}, totals.metrics.maxima.data()));
  });
}

// Throws unless the places of tokens ascend within [0, size).
void check_places(std::string_view function, const int64_t* places, int64_t count, int64_t size) {
  for (int64_t i = 0; i < count; ++i) {
    require((i == 0 ? 0 : places[i - 1] + 1) <= places[i] && places[i] < size, [&] {
      return std::string(function) + ": places must ascend within [0, " + text(size) + "), got " +
             text(places[i]) + " at [" + text(i) + "]";
    });
  }
}

// The part of a chunk of logits [C, V] in the loss of a batch, whose logps they are at `places`:
// see rl/kernels/chunked_policy_loss.h. logits: contiguous; with a gradient they become it. The two
// results in the middle are [C] in float64.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> policy_loss_of_logits(
    Tensor logits, const Tensor& targets, const Tensor& places, const Tensor& advantages,
    const Tensor& response_mask, const std::optional<Tensor>& old_logps,
    const std::optional<Tensor>& ref_logps, const std::optional<Tensor>& offsets,
    const Name& objective_name, const Names& option_names, const Tensor& option_values,
    const Names& choice_names, const Names& choice_values, const std::optional<Tensor>& normalizer,
    double temperature, double scale, double softcap, int64_t ignore_index, bool with_entropies,
    bool with_gradient) {
  return with_public_errors([&] {
    const auto function = "linear_policy_loss";
    const Inputs in{response_mask, advantages, response_mask,      old_logps,
                    ref_logps,     {},         contiguous(offsets)};
    const PolicyObjective objective = objective_of(
        function, {objective_name, option_names, option_values, choice_names, choice_values});
    const PolicyArrays arrays = arrays_of(function, in);
    const bool wide = logits.scalar_type() == ScalarType::Double;
    ChunkedPolicyLoss loss(function, arrays, wide ? DType::float64 : DType::float32, objective,
                           normalizer_of(function, normalizer), torch_executor());
    require(logits.dim() == 2 && logits.is_contiguous(),
            [&] { return std::string(function) + ": logits must be [C, V] and contiguous"; });
    const MutableLogits rows{.data = logits.mutable_data_ptr(),
                             .dtype = dtype_of(function, "logits", logits),
                             .rows = logits.size(0),
                             .vocabulary = logits.size(1),
                             .row_stride = logits.size(1)};
    const auto doubles = [&](bool wanted) {
      return torch::stable::empty({wanted ? logits.size(0) : 0}, ScalarType::Double);
    };
    const Tensor logps = doubles(true), entropies = doubles(with_entropies);
    const RowOptions options{.temperature = temperature,
                             .scale = scale,
                             .softcap = softcap,
                             .ignore_index = ignore_index,
                             .sums = with_entropies ? RowSums::entropy : RowSums::logp};
    const auto numbers = [](const Tensor& tensor) {
      return static_cast<double*>(tensor.mutable_data_ptr());
    };
    const auto* ids = numbers_of<const int64_t>(function, "targets", targets, rows.rows);
    const auto* at = numbers_of<const int64_t>(function, "places", places, rows.rows);
    check_places(function, at, rows.rows, response_mask.numel());
    loss.add(rows, ids, at, options, with_gradient, numbers(logps),
             with_entropies ? numbers(entropies) : nullptr);
    const PolicyTotals& totals = loss.totals();
    return std::tuple(new_doubles({}, &totals.loss), logps, entropies,
                      new_doubles({PolicyMetrics::kSums, 2}, totals.metrics.sums.data()),
                      new_doubles({PolicyMetrics::kMaxima}, totals.metrics.maxima.data()));
  });
}

std::tuple<Tensor, Tensor, Tensor> preference_loss_forward(
    const Tensor& logps, const Tensor& response_mask, const std::optional<Tensor>& ref_logps,
    const std::optional<Tensor>& offsets, const Name& objective_name, const Names& option_names,
    const Tensor& option_values, const Names& choice_names, const Names& choice_values,
    const std::optional<Tensor>& normalizer, bool with_gradient) {
  return with_public_errors([&] {
    const auto function = "preference_loss";
    const std::optional<Tensor> ends = contiguous(offsets);
    PreferenceArrays arrays;
    arrays.layout = layout_of(function, "logps", logps, ends);
    arrays.logps = like_logps(function, "logps", logps, logps);
    arrays.response_mask = like_logps(function, "response_mask", response_mask, logps);
    if (ref_logps) arrays.ref_logps = like_logps(function, "ref_logps", *ref_logps, logps);
    const PreferenceObjective objective = preference_objective_of(
        function, {objective_name, option_names, option_values, choice_names, choice_values});
    PairNormalizer step;
    if (normalizer) {
      const double* numbers = numbers_of<const double>(function, "normalizer", *normalizer, 3);
      if (numbers[0] != -infinity) step.pairs = numbers[0];
      step.world_size = numbers[1];
      step.scale = numbers[2];
    }
    MutableArray gradient;
    const Tensor dlogps = gradient_buffer(with_gradient, logps, gradient);
    const PreferenceTotals totals =
        preference_loss(arrays, objective, step, gradient, torch_executor());
    const bool wide = logps.scalar_type() == ScalarType::Double;
    return std::tuple(new_scalar(totals.loss, wide ? ScalarType::Double : ScalarType::Float),
                      dlogps,
                      new_doubles({PreferenceMetrics::kSums, 2}, totals.metrics.sums.data()));
  });
}

// PreferenceMetrics::to_map: the values, in the order of preference_metric_names.
Tensor preference_metrics(const Tensor& sums) {
  return with_public_errors([&] {
    PreferenceMetrics metrics;
    fill("preference_metrics", "sums", sums, metrics.sums);
    return python::values_of(metrics.to_map());
  });
}

std::vector<std::string> policy_metric_names() {
  return python::names_of(PolicyMetrics{}.to_map());
}
std::vector<std::string> preference_metric_names() {
  return python::names_of(PreferenceMetrics{}.to_map());
}

// [policy, kl, sequences] of this batch.
Tensor policy_local_counts(const Tensor& logps, const Tensor& advantages,
                           const Tensor& response_mask, const std::optional<Tensor>& offsets,
                           const Name& objective_name, const Names& option_names,
                           const Tensor& option_values, const Names& choice_names,
                           const Names& choice_values) {
  return with_public_errors([&] {
    const Inputs in{logps, advantages, response_mask, {}, {}, {}, contiguous(offsets)};
    const PolicyArrays arrays = arrays_of("local_counts", in);
    const PolicyObjective objective = objective_of(
        "local_counts", {objective_name, option_names, option_values, choice_names, choice_values});
    const Normalizer counts = local_counts(arrays, objective, torch_executor());
    const double values[] = {*counts.policy, *counts.kl, *counts.sequences};
    return new_doubles({3}, values);
  });
}

// Throws unless the objective of the family exists and its options are legal: for devices without
// a kernel.
bool objective_check(const Name& family, const Name& function, const Name& objective_name,
                     const Names& option_names, const Numbers& option_values,
                     const Names& choice_names, const Names& choice_values) {
  return with_public_errors([&] {
    Tensor values = new_doubles({static_cast<int64_t>(option_values.size())}, option_values.data());
    const Wanted wanted{objective_name, option_names, values, choice_names, choice_values};
    if (family.text == "policy") {
      check_objective(function.text, objective_of(function.text, wanted));
    } else {
      check_objective(function.text, preference_objective_of(function.text, wanted));
    }
    return true;
  });
}

// PolicyMetrics::to_map: the values, in the order of policy_metric_names.
Tensor policy_metrics(const Tensor& sums, const Tensor& maxima) {
  return with_public_errors([&] {
    PolicyMetrics metrics;
    fill("policy_metrics", "sums", sums, metrics.sums);
    fill("policy_metrics", "maxima", maxima, metrics.maxima);
    return python::values_of(metrics.to_map());
  });
}

// family, name, formula, paper, agreement of every row of the catalogue.
std::vector<std::string> catalogue() {
  std::vector<std::string> out;
  const auto add = [&](std::string_view family, const auto& rows) {
    for (const auto& row : rows) {
      for (const std::string_view each :
           {family, row.name, row.formula, row.paper, row.agreement}) {
        out.emplace_back(each);
      }
    }
  };
  add("policy", kCatalogue);
  add("preference", kPreferenceCatalogue);
  return out;
}

// body(objective) for the row called `name`, of either family.
template <class Body>
auto with_objective(const std::string& name, Body body) {
  for (const PreferenceRow& row : kPreferenceCatalogue) {
    if (row.name == name) return body(row.preset());
  }
  return body(preset("objectives", name));
}

// The choices of one row: names, defaults, and what is legal, side by side.
std::vector<std::string> catalogue_choices(const Name& objective_name) {
  return with_public_errors([&] {
    return with_objective(objective_name.text, [](const auto& objective) {
      std::vector<std::string> out;
      for_each_choice(objective, [&](std::string_view name, auto value, const auto& names) {
        std::string legal;
        for (const std::string_view each : names) detail::append(legal, each);
        out.emplace_back(name);
        out.emplace_back(names[static_cast<size_t>(value)]);
        out.push_back(legal);
      });
      return out;
    });
  });
}

// The options of one row: names, defaults, legal ranges in words.
std::tuple<std::vector<std::string>, Numbers, std::vector<std::string>> catalogue_options(
    const Name& objective_name) {
  return with_public_errors([&] {
    return with_objective(objective_name.text, [](const auto& objective) {
      std::tuple<std::vector<std::string>, Numbers, std::vector<std::string>> out;
      for_each_option(objective, [&](std::string_view name, double value, const Range& range) {
        std::get<0>(out).emplace_back(name);
        std::get<1>(out).push_back(value);
        std::get<2>(out).push_back(text(range));
      });
      return out;
    });
  });
}

}  // namespace
}  // namespace tether

STABLE_TORCH_LIBRARY(tether, library) {
  library.def(
      "policy_loss_forward(Tensor logps, Tensor advantages, Tensor response_mask, "
      "Tensor? old_logps, Tensor? ref_logps, Tensor? entropies, Tensor? offsets, str objective, "
      "str[] option_names, Tensor option_values, str[] choice_names, str[] choice_values, "
      "Tensor? normalizer, bool with_gradient) -> "
      "(Tensor loss, Tensor dlogps, Tensor dentropies, Tensor metric_sums, Tensor metric_maxima)");
  library.def(
      "policy_local_counts(Tensor logps, Tensor advantages, Tensor response_mask, "
      "Tensor? offsets, str objective, str[] option_names, Tensor option_values, "
      "str[] choice_names, str[] choice_values) -> Tensor");
  library.def(
      "objective_check(str family, str function, str objective, str[] option_names, "
      "float[] option_values, str[] choice_names, str[] choice_values) -> bool");
  library.def(
      "preference_loss_forward(Tensor logps, Tensor response_mask, Tensor? ref_logps, "
      "Tensor? offsets, str objective, str[] option_names, Tensor option_values, "
      "str[] choice_names, str[] choice_values, Tensor? normalizer, bool with_gradient) -> "
      "(Tensor loss, Tensor dlogps, Tensor metric_sums)");
  library.def(
      "policy_loss_of_logits(Tensor(a!) logits, Tensor targets, Tensor places, Tensor advantages, "
      "Tensor response_mask, Tensor? old_logps, Tensor? ref_logps, Tensor? offsets, str objective, "
      "str[] option_names, Tensor option_values, str[] choice_names, str[] choice_values, "
      "Tensor? normalizer, float temperature, float scale, float softcap, int ignore_index, "
      "bool with_entropies, bool with_gradient) -> "
      "(Tensor loss, Tensor logps, Tensor entropies, Tensor metric_sums, Tensor metric_maxima)");
  library.def("preference_metrics(Tensor sums) -> Tensor");
  library.def("preference_metric_names() -> str[]");
  library.def("policy_metrics(Tensor sums, Tensor maxima) -> Tensor");
  library.def("policy_metric_names() -> str[]");
  library.def("catalogue() -> str[]");
  library.def("catalogue_choices(str objective) -> str[]");
  library.def("catalogue_options(str objective) -> (str[] names, float[] defaults, str[] ranges)");
}

STABLE_TORCH_LIBRARY_IMPL(tether, CPU, library) {
  library.impl("policy_loss_forward", TORCH_BOX(&tether::policy_loss_forward));
  library.impl("policy_local_counts", TORCH_BOX(&tether::policy_local_counts));
  library.impl("preference_loss_forward", TORCH_BOX(&tether::preference_loss_forward));
  library.impl("policy_loss_of_logits", TORCH_BOX(&tether::policy_loss_of_logits));
  library.impl("preference_metrics", TORCH_BOX(&tether::preference_metrics));
  library.impl("policy_metrics", TORCH_BOX(&tether::policy_metrics));
}

STABLE_TORCH_LIBRARY_IMPL(tether, CompositeExplicitAutograd, library) {
  library.impl("objective_check", TORCH_BOX(&tether::objective_check));
  library.impl("preference_metric_names", TORCH_BOX(&tether::preference_metric_names));
  library.impl("policy_metric_names", TORCH_BOX(&tether::policy_metric_names));
  library.impl("catalogue", TORCH_BOX(&tether::catalogue));
  library.impl("catalogue_choices", TORCH_BOX(&tether::catalogue_choices));
  library.impl("catalogue_options", TORCH_BOX(&tether::catalogue_options));
}
