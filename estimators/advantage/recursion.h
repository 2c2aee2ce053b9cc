#pragma once

#include <array>
#include <concepts>
#include <cstddef>
#include <iterator>
#include <string_view>
#include <type_traits>
#include <utility>

#include "../../core/arguments.h"
#include "../../core/batch.h"
#include "../../core/check.h"
#include "../../core/formula.h"
#include "../../core/number.h"

namespace tether {

// Advantages by a recursion over the tokens of a row, from its end:
//
//   x_t = base_t + next_t V_{t+1} + keep_t x_{t+1},   A_t = x_t,   return_t = V_t + x_t
//
// Returns, generalized advantages and V-trace differ in base, next and keep, which are a formula of
// the token (catalogue.h). What they share is how rows end and what lies between tokens.
//
// After the last token V is `bootstrap` and x is 0. At a token that is `done` the episode ends:
// V_{t+1} = x_{t+1} = 0. At one that is `truncated` it is cut off, not over: x_{t+1} = 0 and
// V_{t+1} is its `truncation_values`.
//
// Over a masked gap (tool output, observations) nothing passes with carry: one step lies between
// the tokens around it (verl, NeMo-RL). With decay every masked slot between tokens is a step
// without reward: V = gamma V_{t+1} and x = keep x_{t+1}, keep as of a token whose ratio is 1. What
// follows the last token is padding. Masked slots are not looked at and come out as 0.
//
// NaN or infinity at a token comes out as NaN there and before it, up to an end, by discounts of 0
// too; what overflows is bounded at 1e300.
enum class MaskGap { carry, decay };
inline constexpr std::array<std::string_view, 2> kMaskGapNames{"carry", "decay"};

// Rows [B, T], or packed [N]. Slots of weight 0 may hold anything; fractional weights count as
// tokens. Constants all: no gradient flows into advantages. An estimator looks at what it reads.
template <class Array>
struct AdvantageInputs {
  LayoutOf<Array> layout = {};
  Array rewards = {};
  Array values = {};  // V, of the state before the token
  Array response_mask = {};
  Array bootstrap = {};          // [B], the value after the last token; absent: 0
  Array done = {};               // the episode ends at this token
  Array truncated = {};          // it is cut off, not over
  Array truncation_values = {};  // needed with truncated
  Array lambdas = {};            // [B] or per token, in [0, 1], goes before the estimator's lambda:
                                 // VAPO's length-adaptive lambda, arXiv:2504.05118
  Array log_ratios = {};  // log pi(token) - log mu(token) [nats], mu the policy that sampled it
  OffsetsOf<Array> offsets = {};

  static constexpr auto arguments() {
    using In = AdvantageInputs;
    using A = Argument<In, Array>;
    constexpr auto optional = Use::optional;
    return std::array{
        A{"rewards", &In::rewards, Shape::rows},
        A{"values", &In::values, Shape::tokens, Kind::floating, optional},
        A{"response_mask", &In::response_mask, Shape::tokens, Kind::mask},
        A{"bootstrap", &In::bootstrap, Shape::per_row, Kind::floating, optional},
        A{"done", &In::done, Shape::tokens, Kind::flags, optional},
        A{"truncated", &In::truncated, Shape::tokens, Kind::flags, optional},
        A{"truncation_values", &In::truncation_values, Shape::tokens, Kind::floating, optional},
        A{"lambdas", &In::lambdas, Shape::either, Kind::floating, optional},
        A{"log_ratios", &In::log_ratios, Shape::tokens, Kind::floating, optional}};
  }
};
using AdvantageArrays = AdvantageInputs<ConstArray>;

// What a recursion sees of one token; 0 for what its traits do not say that it reads.
template <class Number>
struct RecursionToken {
  Number reward;     // r_t
  Number value;      // V_t
  Number log_ratio;  // log pi(token) - log mu(token)
  Number lambda;     // the token's own where `lambdas` is given, else the option; 1 without either
};

// A number of the token and the array that it comes from. It is read where a trait asks for it;
// without a trait, where the array is given.
struct TokenNumber {
  ConstArray AdvantageArrays::* array;
  Constant<double> RecursionToken<Constant<double>>::* member;
  bool Traits::* needed = nullptr;
};
// All but lambda, which may be an option.
inline constexpr TokenNumber kTokenNumbers[] = {
    {&AdvantageArrays::rewards, &RecursionToken<Constant<double>>::reward},
    {&AdvantageArrays::values, &RecursionToken<Constant<double>>::value, &Traits::needs_values},
    {&AdvantageArrays::log_ratios, &RecursionToken<Constant<double>>::log_ratio,
     &Traits::needs_log_ratios}};
using TokenNumberIndices = std::make_index_sequence<std::size(kTokenNumbers)>;

// How an episode ends at a token, or does not, by what these arrays hold there; 0 for an absent
// one.
inline constexpr ConstArray AdvantageArrays::* kEndArrays[] = {
    &AdvantageArrays::done, &AdvantageArrays::truncated, &AdvantageArrays::truncation_values};
struct EpisodeEnd {
  bool ends = false;
  double after = 0;  // V behind the end: 0 where the episode is over, NaN for no finite number

  // number(place): what the array there holds, the place a constant.
  template <class Number>
  TETHER_FORMULA static EpisodeEnd of(const Number& number) {
    const bool done = number(Place<0>{}) != 0, truncated = number(Place<1>{}) != 0;
    if (!truncated || done) return {done, 0};
    const double after = number(Place<2>{});
    return {true, after + after * 0};
  }

 private:
  template <size_t i>
  using Place = std::integral_constant<size_t, i>;
};

template <class Number>
struct Step {
  Number base, next, keep;
};

// The same quantity of many tokens side by side; `size` is a multiple of 16.
struct RecursionColumns {
  const double* numbers[std::size(kTokenNumbers)];
  const double* lambda;
  int size;

  TETHER_INLINE RecursionToken<Constant<double>> at(int i) const {
    return at(i, TokenNumberIndices{});
  }

 private:
  template <size_t... k>
  TETHER_INLINE RecursionToken<Constant<double>> at(int i, std::index_sequence<k...>) const {
    RecursionToken<Constant<double>> token{};
    token.lambda = {lambda[i]};
    ((token.*kTokenNumbers[k].member = {numbers[k][i]}), ...);
    return token;
  }
};
struct StepColumns {
  double* base;
  double* next;
  double* keep;
};

template <class Formula>
concept RecursionFormula =
    SmallFormula<Formula> &&
    requires(const Formula formula, const RecursionToken<Constant<double>> token) {
      { formula.gamma } -> std::convertible_to<double>;
      { formula.gap } -> std::convertible_to<MaskGap>;
      { formula.step(token) } -> std::same_as<Step<Constant<double>>>;
    };

// Where A is not x: A_t = base + next V_{t+1} + keep x_{t+1} by coefficients of its own.
template <class Formula>
concept HasOwnAdvantage =
    requires(const Formula formula, const RecursionToken<Constant<double>> token) {
      { formula.advantage(token) } -> std::same_as<Step<Constant<double>>>;
    };

// Of x or, where kOwn, of the advantage.
template <bool kOwn, class Formula>
TETHER_HEADER_CLONES void fill_steps(const Formula& formula_in, const RecursionColumns& in_place,
                                     const StepColumns& out_place) {
  const Formula formula = formula_in;
  const RecursionColumns in = in_place;
  const StepColumns out = out_place;
  const int size = in.size / 16 * 16;
#pragma GCC ivdep
  for (int i = 0; i < size; ++i) {  // VECTOR
    const Step<Constant<double>> step = [&]() __attribute__((always_inline)) {
      if constexpr (kOwn) {
        return formula.advantage(in.at(i));
      } else {
        return formula.step(in.at(i));
      }
    }();
    out.base[i] = step.base.value;
    out.next[i] = step.next.value;
    out.keep[i] = step.keep.value;
  }
}

namespace detail {

struct RecursionCalls {
  double (*gamma)(const void*);
  double (*lambda)(const void*);
  bool has_lambda;
  MaskGap (*gap)(const void*);
  void (*steps)(const void*, const RecursionColumns&, const StepColumns&);
  void (*advantages)(const void*, const RecursionColumns&, const StepColumns&);  // or null

  template <class Formula>
  static constexpr RecursionCalls of() {
    constexpr bool kLambda = requires(const Formula recursion) { recursion.lambda; };
    RecursionCalls out{&gamma_of<Formula>, &lambda_of<Formula>, kLambda,
                       &gap_of<Formula>,   &steps_of<Formula>,  nullptr};
    if constexpr (HasOwnAdvantage<Formula>) out.advantages = &advantages_of<Formula>;
    return out;
  }
  template <class Formula>
  static const Formula& as(const void* formula) {
    return *static_cast<const Formula*>(formula);
  }
  template <class Formula>
  static double gamma_of(const void* formula) {
    return as<Formula>(formula).gamma;
  }
  template <class Formula>
  static double lambda_of(const void* formula) {
    if constexpr (requires { as<Formula>(formula).lambda; }) {
      return as<Formula>(formula).lambda;
    } else {
      return 1;
    }
  }
  template <class Formula>
  static MaskGap gap_of(const void* formula) {
    return as<Formula>(formula).gap;
  }
  template <class Formula>
  static void steps_of(const void* formula, const RecursionColumns& in, const StepColumns& out) {
    fill_steps<false>(as<Formula>(formula), in, out);
  }
  template <class Formula>
  static void advantages_of(const void* formula, const RecursionColumns& in,
                            const StepColumns& out) {
    fill_steps<true>(as<Formula>(formula), in, out);
  }
};

}  // namespace detail

// Any recursion, the library's own (catalogue.h) or a user's, as a value: an option struct with
// members `gamma` and `gap`, and `lambda` where it has one,
//   template <class Number>
//   TETHER_FORMULA Step<Number> step(const RecursionToken<Number>&) const
// and, where A is not x, `advantage` of the same kind. Its traits say whether it needs values and
// log_ratios.
class Recursion : public AnyFormula<detail::RecursionCalls> {
 public:
  template <RecursionFormula Formula>
  Recursion(const Formula& formula) : AnyFormula(formula) {}

  double gamma() const { return calls().gamma(formula()); }
  double lambda() const { return calls().lambda(formula()); }
  MaskGap gap() const { return calls().gap(formula()); }
  bool has_lambda() const { return calls().has_lambda; }
  bool has_own_advantage() const { return calls().advantages != nullptr; }

  void steps(const RecursionColumns& in, const StepColumns& out) const {
    calls().steps(formula(), in, out);
  }
  void advantages(const RecursionColumns& in, const StepColumns& out) const {
    calls().advantages(formula(), in, out);
  }
};

// Throws unless what the recursion reads is given.
inline void check_reads(std::string_view function, const AdvantageInputs<bool>& given,
                        const Recursion& recursion) {
  const auto must = [&](bool there, std::string_view name) {
    require(there, [&] { return named(function, name) + " must be given, got none"; });
  };
  const Traits& reads = recursion.traits();
  must(given.values || !reads.needs_values, "values");
  must(given.truncation_values || !given.truncated, "truncation_values");
  must(given.log_ratios || !reads.needs_log_ratios, "log_ratios");
}

}  // namespace tether
