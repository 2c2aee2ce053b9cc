#pragma once

#include <string_view>
#include <vector>

#include "estimators/advantage/gae.h"
#include "estimators/advantage/group.h"
#include "estimators/advantage/returns.h"
#include "estimators/advantage/whitening.h"
#include "estimators/kl/report.h"
#include "python/functions.h"

// The estimators as functions of python/functions.h.

namespace tether::python {

// What estimators share: they have no gradient, and no rules beyond their lists.
struct Estimator {
  static constexpr bool kGradient = false;
  template <class Given, class Options>
  static void check(std::string_view function, const Given&, int64_t, const Options& options) {
    if constexpr (HasFields<Options>) check_fields(function, options);
  }
};

struct GaeFunction : Estimator {
  template <class Array>
  using Inputs = GaeInputs<Array>;
  using Options = Gae;
  static constexpr std::string_view kName = "generalized_advantage_estimation";
  static constexpr std::array kResults{Result{"advantages", "like"}, Result{"returns", "like"}};

  static std::vector<Tensor> run(const Call<GaeFunction>& call) {
    const Tensor advantages = new_like(call.tensors.rewards), returns = new_like(advantages);
    generalized_advantage_estimation(call.arrays, call.options,
                                     face::mutable_token_array(advantages),
                                     face::mutable_token_array(returns), torch_executor());
    return {advantages, returns};
  }
};

struct ReturnsFunction : Estimator {
  template <class Array>
  using Inputs = ReturnsInputs<Array>;
  using Options = DiscountedReturns;
  static constexpr std::string_view kName = "discounted_returns";
  static constexpr std::array kResults{Result{"returns", "like"}};

  static std::vector<Tensor> run(const Call<ReturnsFunction>& call) {
    const Tensor out = new_like(call.tensors.rewards);
    discounted_returns(call.arrays, call.options, face::mutable_token_array(out));
    return {out};
  }
};

struct GroupFunction : Estimator {
  template <class Array>
  using Inputs = GroupInputs<Array>;
  struct Options {
    GroupAdvantage rule;
    double group_size = 1;  // where there are no ids
  };
  static constexpr std::string_view kName = "group_advantage";
  static constexpr std::array kResults{Result{"advantages", "like"}};

  // rewards: contiguous, float32 or float64. group_ids: contiguous int64, or none.
  static std::vector<Tensor> run(const Call<GroupFunction>& call) {
    const Tensor& rewards = call.tensors.rewards;
    const Tensor& ids = call.tensors.group_ids;
    const bool wide = rewards.scalar_type() == ScalarType::Double;
    require((wide || rewards.scalar_type() == ScalarType::Float) && rewards.is_contiguous(), [] {
      return std::string("group_advantage: rewards must be contiguous float32 or float64");
    });
    const Tensor out = new_like(rewards);
    const auto run = [&]<class T>(T) {
      const T* in = static_cast<const T*>(rewards.const_data_ptr());
      T* values = static_cast<T*>(out.mutable_data_ptr());
      if (ids.defined()) {
        const auto* groups = numbers_of<const int64_t>(kName, "group_ids", ids, rewards.numel());
        group_advantage(in, groups, rewards.numel(), call.options.rule, values);
      } else {
        const auto size = static_cast<int64_t>(call.options.group_size);
        group_advantage(in, rewards.numel(), size, call.options.rule, values);
      }
    };
    wide ? run(double{}) : run(float{});
    return {out};
  }
};

template <class Visit>
void for_each_option(GroupFunction::Options& options, Visit visit) {
  for_each_field(options.rule, visit);
  visit("group_size", options.group_size, Range{1, 0x1p53});
}
template <class Visit>
void for_each_choice(GroupFunction::Options& options, Visit visit) {
  tether::for_each_choice(options.rule, visit);
}

struct MomentsFunction : Estimator {
  template <class Array>
  using Inputs = WhiteningInputs<Array>;
  struct Options {
    static constexpr auto fields() { return std::tuple{}; }
  };
  static constexpr std::string_view kName = "moments";
  static constexpr std::array kResults{Result{"moments", "block", {}, {3}}};

  static std::vector<Tensor> run(const Call<MomentsFunction>& call) {
    const Moments out = moments(call.arrays);
    const double values[] = {out.count, out.mean, out.squares};
    return {new_doubles({3}, values)};
  }
};

struct WhitenFunction : Estimator {
  template <class Array>
  using Inputs = WhiteningInputs<Array>;
  struct Options {
    Whitening rule;
    Moments step;
  };
  static constexpr std::string_view kName = "whiten";
  static constexpr std::array kResults{Result{"whitened", "like"}};

  static std::vector<Tensor> run(const Call<WhitenFunction>& call) {
    const Tensor out = new_like(call.tensors.values);
    whiten(call.arrays, call.options.step, call.options.rule, face::mutable_token_array(out));
    return {out};
  }
};

template <class Visit>
void for_each_option(WhitenFunction::Options& options, Visit visit) {
  for_each_field(options.rule, visit);
  visit("step.count", options.step.count, Range{});
  visit("step.mean", options.step.mean, Range{});
  visit("step.squares", options.step.squares, Range{});
}
template <class Visit>
void for_each_choice(WhitenFunction::Options& options, Visit visit) {
  tether::for_each_choice(options.rule, visit);
}

struct KlReportFunction : Estimator {
  template <class Array>
  using Inputs = KlReportInputs<Array>;
  using Options = KlReportOptions;
  static constexpr std::string_view kName = "kl_report";
  static constexpr std::array kResults{Result{"report", "block", {}, {7}}};

  // The fields of KlReport, in their order.
  static std::vector<Tensor> run(const Call<KlReportFunction>& call) {
    const KlReport out = kl_report(call.arrays, call.options);
    const double values[] = {out.mean, out.standard_error, out.lambda,   out.ratio_excess,
                             out.ess,  out.tokens,         out.sequences};
    return {new_doubles({7}, values)};
  }
};

}  // namespace tether::python
