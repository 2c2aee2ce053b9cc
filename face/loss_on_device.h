#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "../core/check.h"
#include "../core/cuda_numbers.h"
#include "../rl/kernels/policy_loss_cuda.h"
#include "../rl/kernels/preference_loss.h"
#include "../rl/kernels/preference_loss_cuda.h"
#include "../rl/kernels/value_loss.h"
#include "../rl/kernels/value_loss_cuda.h"

// The losses of rl/kernels/*_cuda.h as the faces for tensors of CUDA call them.

namespace tether::face {

// The kernels of a loss:
//   has(batch, objective, normalizer)     whether there are any
//   check(batch, objective, normalizer)   throws where there are none
//   bytes(batch, objective)               the memory that they work in
//   step(objective, normalizer)           the denominators that the call states; empty: the batch's
//   run(...)                              the loss; counts null: those of the batch
template <class Objective>
struct LossKernels;

template <>
struct LossKernels<PolicyObjective> {
  using Arrays = PolicyArrays;
  using Denominators = Normalizer;
  using Totals = PolicyTotals;
  static constexpr const char* kFunction = "policy_loss";
  static constexpr int64_t kCounts = 3;

  static bool has(const Arrays& batch, const PolicyObjective& objective, const Normalizer&) {
    return cuda::is_supported(batch, objective);
  }
  static void check(const Arrays& batch, const PolicyObjective& objective, const Normalizer&) {
    cuda::check_supported(kFunction, batch, objective);
  }
  static int64_t bytes(const Arrays& batch, const PolicyObjective& objective) {
    return cuda::policy_workspace_bytes(batch, objective);
  }
  static std::vector<double> step(const PolicyObjective& objective, const Normalizer& given) {
    const StepCounts step = step_counts(kFunction, given, {}, objective.aggregation);
    if (!given.policy && !given.kl && !given.sequences) return {};
    return {step.policy.tokens, step.kl.tokens, step.policy.sequences};
  }
  static void run(const Arrays& batch, const PolicyObjective& objective, const double* counts,
                  double factor, const std::vector<MutableArray>& gradients, Totals* totals,
                  void* workspace, cuda::Stream stream) {
    cuda::policy_loss(batch, objective, counts, factor, {gradients[0], gradients[1]}, totals,
                      workspace, stream);
  }
};

template <>
struct LossKernels<PreferenceObjective> {
  using Arrays = PreferenceArrays;
  using Denominators = PairNormalizer;
  using Totals = PreferenceTotals;
  static constexpr const char* kFunction = "preference_loss";
  static constexpr int64_t kCounts = 2;

  // The pairs of the batch are not known beside the tokens of the step.
  static bool is_stated(const PairNormalizer& given) { return given.pairs || !given.tokens; }
  static bool has(const Arrays& batch, const PreferenceObjective& objective,
                  const PairNormalizer& given) {
    return is_stated(given) && cuda::is_supported(batch, objective);
  }
  static void check(const Arrays& batch, const PreferenceObjective& objective,
                    const PairNormalizer& given) {
    cuda::check_supported(kFunction, batch, objective);
    require(is_stated(given), [&] {
      return named(kFunction, "normalizer.pairs") +
             " must be given where normalizer.tokens is, on a CUDA device, got none";
    });
  }
  static int64_t bytes(const Arrays& batch, const PreferenceObjective&) {
    return cuda::preference_workspace_bytes(batch);
  }
  static std::vector<double> step(const PreferenceObjective& objective,
                                  const PairNormalizer& given) {
    check_denominators(kFunction, given, objective);
    if (!given.pairs) return {};
    return {*given.pairs, given.tokens.value_or(0)};
  }
  static void run(const Arrays& batch, const PreferenceObjective& objective, const double* counts,
                  double factor, const std::vector<MutableArray>& gradients, Totals* totals,
                  void* workspace, cuda::Stream stream) {
    cuda::preference_loss(batch, objective, counts, factor, gradients[0], totals, workspace,
                          stream);
  }
};

template <>
struct LossKernels<ValueObjective> {
  using Arrays = ValueArrays;
  using Denominators = Normalizer;
  using Totals = ValueTotals;
  static constexpr const char* kFunction = "value_loss";
  static constexpr int64_t kCounts = 2;

  static bool has(const Arrays& batch, const ValueObjective& objective, const Normalizer&) {
    return cuda::is_supported(batch, objective);
  }
  static void check(const Arrays& batch, const ValueObjective& objective, const Normalizer&) {
    cuda::check_supported(kFunction, batch, objective);
  }
  static int64_t bytes(const Arrays& batch, const ValueObjective&) {
    return cuda::value_workspace_bytes(batch);
  }
  static std::vector<double> step(const ValueObjective& objective, const Normalizer& given) {
    const TermCounts step = step_counts(kFunction, given, {}, objective.aggregation).policy;
    if (!given.policy && !given.sequences) return {};
    return {step.tokens, step.sequences};
  }
  static void run(const Arrays& batch, const ValueObjective& objective, const double* counts,
                  double factor, const std::vector<MutableArray>& gradients, Totals* totals,
                  void* workspace, cuda::Stream stream) {
    cuda::value_loss(batch, objective, counts, factor, gradients[0], totals, workspace, stream);
  }
};

// A call, whose arguments must outlive it. Throws Error where the kernels have none for it.
template <class Objective>
class LossOnDevice {
 public:
  using Kernels = LossKernels<Objective>;
  static constexpr int64_t kNumbers = sizeof(typename Kernels::Totals) / sizeof(double);

  LossOnDevice(const typename Kernels::Arrays& batch, const Objective& objective,
               const typename Kernels::Denominators& normalizer)
      : batch_(batch), objective_(objective), factor_(normalizer.factor()) {
    Kernels::check(batch, objective, normalizer);
    step_ = Kernels::step(objective, normalizer);
  }

  // float64 numbers of memory that it works in.
  int64_t memory() const {
    const auto counts = static_cast<int64_t>(step_.size());
    return counts + (Kernels::bytes(batch_, objective_) + 7) / 8;
  }

  // To totals[kNumbers], the loss first, and to the gradients that are wanted. `counts` [kCounts]
  // on the device; null: those that the call states, else of the batch.
  void run(const double* counts, const std::vector<MutableArray>& gradients, void* totals,
           double* memory, cuda::Stream stream) const {
    if (counts == nullptr && !step_.empty()) {
      cuda::set_numbers(Kernels::kFunction, step_, memory, stream);
      counts = memory;
    }
    Kernels::run(batch_, objective_, counts, factor_, gradients,
                 static_cast<typename Kernels::Totals*>(totals), memory + step_.size(), stream);
  }

 private:
  const typename Kernels::Arrays& batch_;
  const Objective& objective_;
  double factor_;
  std::vector<double> step_;
};

}  // namespace tether::face
