#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <cstddef>
#include <initializer_list>
#include <optional>
#include <span>
#include <sstream>
#include <string>
#include <string_view>
#include <type_traits>
#include <vector>

#include "core/options.h"
#include "face/arguments.h"
#include "python/stable.h"

// Operators of functions whose arrays and options are lists (core/arguments.h, core/options.h).
// From the lists come an operator's schema, its kernel, which takes its arguments from the stack by
// them, and what Python knows of the function. A Function has
//
//   template <class Array> using Inputs   its arrays
//   struct Options                        what the names and values of a call set
//   kName, kResults                       its name, what it returns
//   kGradient                             true: the last argument says whether gradients are wanted
//   kMore                                 if there: the name of one more tensor, which may be none
//   run(call)                             the results
//   check(function, given, options)       rules between options and the presence of arrays

namespace tether {

template <>
struct face::Access<torch::stable::Tensor> {
  static Element element(const torch::stable::Tensor& tensor) {
    using torch::headeronly::ScalarType;
    const ScalarType type = tensor.scalar_type();
    const bool index = type == ScalarType::Int || type == ScalarType::Long;
    return {.dtype = python::dtype_of(type),
            .index = index,
            .name = index ? type == ScalarType::Int ? "int32" : "int64" : "another dtype"};
  }
  static std::string device(const torch::stable::Tensor& tensor) {
    return tensor.is_cpu() ? "cpu" : "another device";
  }
};

namespace python {

// What a result is like: an argument in shape and dtype; its stored gradient, empty unless wanted;
// one number of the arithmetic; a block of float64.
struct Result {
  std::string_view name;
  std::string_view kind;  // like, gradient, scalar or block
  std::string_view of = {};
  std::array<int64_t, 2> sizes = {};  // of a block; the second 0: of one dimension
};

// Names and values as Python sends them. The numbers are a tensor: one that changes would make
// torch.compile compile again.
struct Words {
  std::vector<Name> option_names;
  Tensor option_values;
  std::vector<Name> choice_names, choice_values;
};

// The public function that is called by way of this one is a choice like others.
inline void take_caller(Words& words, std::string& caller) {
  for (size_t i = 0; i < words.choice_names.size() && i < words.choice_values.size(); ++i) {
    if (words.choice_names[i].text != "function") continue;
    caller = words.choice_values[i].text;
    words.choice_names.erase(words.choice_names.begin() + static_cast<std::ptrdiff_t>(i));
    words.choice_values.erase(words.choice_values.begin() + static_cast<std::ptrdiff_t>(i));
    return;
  }
}

// A schema in which WORDS stands for the arguments that are words.
inline std::string with_words(std::string schema) {
  constexpr std::string_view kPlace = "WORDS";
  return schema.replace(schema.find(kPlace), kPlace.size(),
                        "str[] option_names, Tensor option_values, str[] choice_names, "
                        "str[] choice_values");
}

// The options of a function, as the words of a call make them.
template <class Options>
Options options_of(std::string_view function, const Words& words) {
  const size_t options = words.option_names.size(), choices = words.choice_names.size();
  const double* values = numbers_of<const double>(function, "option_values", words.option_values,
                                                  static_cast<int64_t>(options));
  require(choices == words.choice_values.size(), [&] {
    return named(function, "choice_values") + " must be " + text(choices) + " names, got " +
           text(words.choice_values.size());
  });
  Options out = [&] {
    if constexpr (requires { Options::of_objective(function, ""); }) {
      for (size_t i = 0; i < choices; ++i) {
        if (words.choice_names[i].text != "objective") continue;
        return Options::of_objective(function, words.choice_values[i].text);
      }
      throw Error(named(function, "objective") + " must be given, got none");
    } else {
      return Options{};
    }
  }();
  for (size_t i = 0; i < choices; ++i) {
    if (words.choice_names[i].text == "objective") continue;
    set_choice(function, out, words.choice_names[i].text, words.choice_values[i].text);
  }
  // After the choices: a weight has options once it is chosen.
  for (size_t i = 0; i < options; ++i) {
    set_option(function, out, words.option_names[i].text, values[i]);
  }
  return out;
}

// ---- results ------------------------------------------------------------------------------------

inline std::vector<int64_t> sizes_of(const Tensor& tensor) {
  std::vector<int64_t> sizes;
  for (int64_t d = 0; d < tensor.dim(); ++d) sizes.push_back(tensor.size(d));
  return sizes;
}

// Contiguous.
inline Tensor new_like(const Tensor& tensor) {
  return empty(sizes_of(tensor), tensor.scalar_type());
}

// Memory for the gradient of `input`; none of it unless wanted. float16 gradients wait in float32
// for the upstream gradient.
inline Tensor new_gradient(bool wanted, const Tensor& input, MutableArray& view) {
  if (!wanted) return empty({0}, input.scalar_type());
  const bool half = input.scalar_type() == ScalarType::Half;
  const Tensor out = empty(sizes_of(input), half ? ScalarType::Float : input.scalar_type());
  view = face::mutable_token_array(out);
  return out;
}

inline Tensor new_doubles(std::initializer_list<int64_t> sizes, const double* values) {
  const Tensor out = empty(sizes, ScalarType::Double);
  std::copy_n(values, out.numel(), static_cast<double*>(out.mutable_data_ptr()));
  return out;
}

// In float64 for float64, else float32.
inline Tensor new_scalar(double value, const Tensor& like) {
  const bool wide = like.scalar_type() == ScalarType::Double;
  const Tensor out = empty({}, wide ? ScalarType::Double : ScalarType::Float);
  if (wide) {
    *static_cast<double*>(out.mutable_data_ptr()) = value;
  } else {
    *static_cast<float*>(out.mutable_data_ptr()) =
        static_cast<float>(representable(value, DType::float32));
  }
  return out;
}

// ---- an operator --------------------------------------------------------------------------------

// The arguments of an operator, one after the other.
class Arguments {
 public:
  explicit Arguments(StableIValue* first) : next_(first) {}

  template <class T>
  T next() {
    return torch::stable::detail::to<T>(*next_++);
  }
  Tensor tensor_or_none() { return next<std::optional<Tensor>>().value_or(Tensor()); }
  Words words() {
    auto names = next<std::vector<Name>>();
    Tensor values = next<Tensor>();
    auto choices = next<std::vector<Name>>();
    return {std::move(names), std::move(values), std::move(choices), next<std::vector<Name>>()};
  }
  // Those of the list for which takes(argument) holds; offsets contiguous.
  template <class Inputs, class Takes>
  void arrays(Inputs& tensors, Takes takes) {
    for (const auto& each : Inputs::arguments()) {
      if (!takes(each)) continue;
      tensors.*each.member = each.use == Use::required ? next<Tensor>() : tensor_or_none();
    }
    if constexpr (face::kHasOffsets<Inputs>) {
      const Tensor offsets = tensor_or_none();
      tensors.offsets = offsets.defined() ? torch::stable::contiguous(offsets) : offsets;
    }
  }

 private:
  StableIValue* next_;
};

constexpr auto kAllArrays = [](const auto&) { return true; };

// The arrays of a schema, each with a comma behind it.
template <class Inputs, class Takes>
std::string schema_of_arrays(Takes takes) {
  std::string out;
  for (const auto& each : Inputs::arguments()) {
    const char* type = each.use == Use::required ? "Tensor " : "Tensor? ";
    if (takes(each)) out += type + std::string(each.name) + ", ";
  }
  if constexpr (face::kHasOffsets<Inputs>) out += "Tensor? offsets, ";
  return out;
}

inline void put_results(StableIValue* stack, const std::vector<Tensor>& results) {
  for (size_t i = 0; i < results.size(); ++i) stack[i] = torch::stable::detail::from(results[i]);
}

template <class Function>
struct Call {
  typename Function::template Inputs<Tensor> tensors;
  typename Function::template Inputs<ConstArray> arrays;
  typename Function::Options options;
  bool with_gradient;
  std::optional<Tensor> more = {};
};

template <class Function>
class Operator {
 public:
  using Inputs = typename Function::template Inputs<Tensor>;

  // `name`: of an operator that is not the function's own.
  static std::string schema(std::string_view name = Function::kName) {
    std::string arguments = schema_of_arrays<Inputs>(kAllArrays), results;
    if constexpr (requires { Function::kMore; }) {
      arguments += "Tensor? " + std::string(Function::kMore) + ", ";
    }
    arguments += "WORDS";
    if (Function::kGradient) arguments += ", bool with_gradient";
    for (const Result& each : Function::kResults) {
      results += (results.empty() ? "Tensor " : ", Tensor ") + std::string(each.name);
    }
    return with_words(std::string(name) + "(" + arguments + ") -> (" + results + ")");
  }

  static void boxed(StableIValue* stack, uint64_t, uint64_t) {
    std::string caller{Function::kName};
    put_results(stack, in_name_of(caller, Function::kName, [&] {
                  Call<Function> call = popped(Arguments(stack), caller);
                  return Function::run(call);
                }));
  }

  // Rules between the options and the arrays that are there; `rows` of the batch.
  static void check(std::string_view function, const std::vector<Name>& given, int64_t rows,
                    const Words& words) {
    const auto options = options_of<typename Function::Options>(function, words);
    typename Function::template Inputs<bool> presence;
    for (const auto& each : Function::template Inputs<bool>::arguments()) {
      presence.*each.member = std::any_of(given.begin(), given.end(),
                                          [&](const Name& name) { return name.text == each.name; });
    }
    Function::check(function, presence, rows, options);
  }

 private:
  // A Function of a device sees to the arrays itself.
  static typename Function::template Inputs<ConstArray> arrays_of(const Inputs& tensors) {
    if constexpr (requires { Function::arrays_of(tensors); }) {
      return Function::arrays_of(tensors);
    } else {
      return face::arrays_of(Function::kName, tensors);
    }
  }

  static Call<Function> popped(Arguments arguments, std::string& caller) {
    Inputs tensors;
    arguments.arrays(tensors, kAllArrays);
    std::optional<Tensor> more;
    if constexpr (requires { Function::kMore; }) more = arguments.next<std::optional<Tensor>>();
    Words words = arguments.words();
    take_caller(words, caller);
    bool with_gradient = false;
    if constexpr (Function::kGradient) with_gradient = arguments.next<bool>();
    face::check_arguments(Function::kName, tensors);
    return {tensors, arrays_of(tensors),
            options_of<typename Function::Options>(Function::kName, words), with_gradient, more};
  }
};

// ---- what Python knows of a function, in JSON --------------------------------------------------

inline std::string json_text(std::string_view text) {
  std::string out = "\"";
  for (const char c : text) {
    if (c == '"' || c == '\\') out += '\\';
    out += c;
  }
  return out + "\"";
}

// As Python's json reads numbers: Infinity is one.
inline std::string number_text(double value) {
  if (value == infinity) return "Infinity";
  if (value == -infinity) return "-Infinity";
  std::ostringstream out;
  out.precision(17);
  out << value;
  return out.str();
}

// [each(a), each(b), ...]
template <class Range, class Each>
std::string json_list(const Range& range, Each each) {
  std::string out;
  for (const auto& item : range) out += (out.empty() ? "" : ", ") + each(item);
  return in_brackets(out);
}

// [a, b, ...]
inline std::string json_list(std::initializer_list<std::string> parts) {
  return json_list(parts, [](const std::string& part) { return part; });
}

inline std::string json_flag(bool value) { return value ? "true" : "false"; }

inline void append_json(std::string& list, const std::string& item) {
  list += (list.empty() ? "" : ", ") + item;
}

// What is said of one option, choice, argument or result is not a template: of the types of options
// there are many, and the package would have a copy for each.

inline std::string json_of_option(std::string_view name, double value, const Range& range) {
  return json_list({json_text(name), number_text(value), number_text(range.low),
                    number_text(range.high), json_flag(range.above), json_text(text(range))});
}

inline std::string json_of_choice(std::string_view name, size_t value,
                                  std::span<const std::string_view> names) {
  return json_list({json_text(name), json_text(names[value]), json_list(names, json_text)});
}

// "options": ..., "choices": ... of anything that has them.
template <class Options>
std::string json_of_options(Options options) {
  std::string numbers, choices;
  for_each_option(options, [&](std::string_view name, double value, const Range& range) {
    append_json(numbers, json_of_option(name, value, range));
  });
  for_each_choice(options, [&](std::string_view name, const auto& value, const auto& names) {
    append_json(choices, json_of_choice(name, chosen(value), names));
  });
  return "\"options\": " + in_brackets(numbers) + ", \"choices\": " + in_brackets(choices);
}

inline std::string json_of_argument(std::string_view name, Shape shape, Kind kind, Use use,
                                    Flow flow, std::string_view like) {
  constexpr std::string_view kShapes[] = {"rows",      "tokens",  "per_row", "either",
                                          "elements",  "answers", "logits",  "hidden",
                                          "positions", "heads",   "weight",  "bias"};
  constexpr std::string_view kKinds[] = {"floating", "narrow", "mask", "counts",
                                         "flags",    "ids",    "same"};
  return json_list({json_text(name), json_text(kShapes[static_cast<size_t>(shape)]),
                    json_text(kKinds[static_cast<size_t>(kind)]), json_flag(use == Use::required),
                    json_flag(flow == Flow::differentiable), json_text(like)});
}

inline std::string json_of_results(std::span<const Result> results) {
  return json_list(results, [](const Result& each) {
    const auto size = [](int64_t n) { return text(n); };
    return json_list({json_text(each.name), json_text(each.kind), json_text(each.of),
                      json_list(each.sizes, size)});
  });
}

template <class Function>
std::string json_of_function() {
  using Inputs = typename Function::template Inputs<Tensor>;
  std::string arguments;
  for (const auto& each : Inputs::arguments()) {
    append_json(arguments,
                json_of_argument(each.name, each.shape, each.kind, each.use, each.flow, each.like));
  }
  std::string options = "\"options\": [], \"choices\": []";
  if constexpr (std::is_default_constructible_v<typename Function::Options>) {
    options = json_of_options(typename Function::Options{});
  }
  return json_text(Function::kName) + ": {\"arguments\": " + in_brackets(arguments) +
         ", \"packed\": " + json_flag(face::kHasOffsets<Inputs>) +
         ", \"gradient\": " + json_flag(Function::kGradient) +
         ", \"results\": " + json_of_results(Function::kResults) + ", " + options + "}";
}

}  // namespace python
}  // namespace tether
