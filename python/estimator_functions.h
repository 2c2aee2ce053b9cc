#pragma once

#include <string_view>
#include <vector>

#include "estimators/advantage/catalogue.h"
#include "estimators/advantage/groups.h"
#include "estimators/advantage/row_scan.h"
#include "estimators/advantage/whitening.h"
#include "estimators/kl/mismatch.h"
#include "estimators/kl/report.h"
#include "python/functions.h"
#include "rl/batch_weight_catalogue.h"
#include "rl/kernels/batch_weights.h"

// The estimators as functions of python/functions.h.

namespace tether::python {

// What estimators share: they have no gradient, and no rules beyond their lists but what an
// estimator of advantages reads.
struct Estimator {
  static constexpr bool kGradient = false;
  template <class Given, class Options>
  static void check(std::string_view function, const Given&, int64_t, const Options& options) {
    if constexpr (HasFields<Options>) check_fields(function, options);
  }
  template <class Given, class Any>
  static void check(std::string_view function, const Given& given, int64_t,
                    const AdvantageOptions<Any>& options) {
    check_reads(function, given, options.estimator);
  }
};

struct AdvantageFunction : Estimator {
  template <class Array>
  using Inputs = AdvantageInputs<Array>;
  using Options = AdvantageOptions<Recursion>;
  static constexpr std::string_view kName = "advantage";
  static constexpr std::array kResults{Result{"advantages", "like"}, Result{"returns", "like"}};

  static std::vector<Tensor> run(const Call<AdvantageFunction>& call) {
    const Tensor advantages = new_like(call.tensors.rewards), returns = new_like(advantages);
    scan_rows(kName, call.arrays, call.options.estimator, face::mutable_token_array(advantages),
              face::mutable_token_array(returns), torch_executor());
    return {advantages, returns};
  }
};

struct GroupFunction : Estimator {
  template <class Array>
  using Inputs = GroupInputs<Array>;
  struct Options : AdvantageOptions<GroupRule> {
    double group_size = 0;  // where there are no ids
  };
  static void check(std::string_view function, const GroupInputs<bool>& given, int64_t,
                    const Options& options) {
    check_reads(function, given, options.estimator);
  }
  static constexpr std::string_view kName = "group_advantage";
  static constexpr std::array kResults{Result{"advantages", "like"}};

  // Contiguous: rewards and lengths float64, group_ids int64.
  static std::vector<Tensor> run(const Call<GroupFunction>& call) {
    const auto& in = call.tensors;
    const Tensor out = new_like(in.rewards);
    const int64_t count = in.rewards.numel();
    const auto given = [&]<class T>(std::string_view name, const Tensor& tensor, T*& numbers) {
      if (tensor.defined()) numbers = numbers_of<T>(kName, name, tensor, count);
    };
    GroupArrays batch{.group_size = static_cast<int64_t>(call.options.group_size), .count = count};
    given("rewards", in.rewards, batch.rewards);
    given("group_ids", in.group_ids, batch.group_ids);
    given("lengths", in.lengths, batch.lengths);
    advantages_of_groups(kName, batch, call.options.estimator,
                         static_cast<double*>(out.mutable_data_ptr()));
    return {out};
  }
};

template <class Visit>
void for_each_option(GroupFunction::Options& options, Visit visit) {
  for_each_option(options.estimator, visit);
  visit("group_size", options.group_size, Range{1, 0x1p53});
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
  visit("step.count", options.step.count, Range{0, largest_finite});
  visit("step.mean", options.step.mean, Range{-largest_finite, largest_finite});
  visit("step.squares", options.step.squares, Range{0, largest_finite});
}
template <class Visit>
void for_each_choice(WhitenFunction::Options& options, Visit visit) {
  tether::for_each_choice(options.rule, visit);
}

struct MismatchReportFunction : Estimator {
  template <class Array>
  using Inputs = MismatchInputs<Array>;
  struct Options {
    static constexpr auto fields() { return std::tuple{}; }
  };
  static constexpr std::string_view kName = "mismatch_report";
  static constexpr std::array kResults{Result{"report", "block", {}, {23}}};

  // The fields of MismatchReport, in their order.
  static std::vector<Tensor> run(const Call<MismatchReportFunction>& call) {
    const MismatchReport out = mismatch_report(call.arrays);
    std::vector<double> values{out.tokens,
                               out.sequences,
                               out.k1,
                               out.k3,
                               out.perplexity,
                               out.rollout_perplexity,
                               out.probability_gap,
                               out.probability_gap_max};
    for (const RatioSpread& each : {out.token, out.sequence_mean, out.sequence_sum}) {
      values.insert(values.end(), {each.mean, each.min, each.max, each.chi2, each.ess});
    }
    return {new_doubles({23}, values.data())};
  }
};

struct BatchWeightsFunction {
  static constexpr bool kGradient = false;
  template <class Array>
  using Inputs = BatchWeightInputs<Array>;
  using Options = BatchWeightOptions;
  static constexpr std::string_view kName = "batch_weights";
  static constexpr std::array kResults{Result{"weights", "like"}};

  static void check(std::string_view function, const BatchWeightInputs<bool>& given, int64_t,
                    const Options& options) {
    check_needs(function, given, options.rule);
  }
  static std::vector<Tensor> run(const Call<BatchWeightsFunction>& call) {
    const Tensor out = new_like(call.tensors.logps);
    batch_weights(kName, call.arrays, call.options.rule, face::mutable_token_array(out));
    return {out};
  }
};

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
