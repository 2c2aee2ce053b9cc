#include <string>
#include <string_view>

#include "core/check.h"
#include "core/cuda_doors.h"
#include "core/cuda_launch.h"
#include "logits/row_types_cuda.h"
#include "rl/kernels/logits_policy_calls.h"
#include "rl/kernels/logits_policy_loss_cuda.h"
#include "rl/kernels/policy_checks.h"
#include "rl/kernels/policy_launch_cuda.h"
#include "rl/kernels/surrogate_cuda.h"

namespace tether::cuda {
namespace {

constexpr const char* kFunction = "policy_loss_of_logits";

void check_objective_of_logits(const PolicyArrays& batch, const PolicyObjective& objective) {
  const std::string function = kFunction;
  require(objective.level == RatioLevel::token, [&] {
    return function + ": level must be token where there are logits, got " +
           std::string(rule_of(objective.level).name);
  });
  require(is_of_own_logits(objective), [&] {
    return function +
           ": weights must not look at the policy where there are logits, got one that "
           "does";
  });
  require(objective.weights.empty() || bool(batch.old_logps), [&] {
    return function + ": old_logps must be given where there are weights and logits, got none";
  });
}

void check_tokens(const ConstLogits& logits, const int64_t* targets, const PolicyArrays& batch,
                  const PolicyObjective& objective, const TokensOfLogits& found,
                  const MutableLogits& dlogits, bool all) {
  const std::string function = kFunction;
  const int64_t tokens = PolicyWorkspace::tokens(batch.layout);
  require(!batch.logps && !batch.entropies, [&] {
    return function + ": logps and entropies must be none where there are logits, got an array";
  });
  const bool inside = found.first >= 0 && found.first <= tokens - logits.rows;
  require(inside && (!all || logits.rows == tokens), [&] {
    return function + ": logits must have a row for each of " + text(tokens) + " tokens, got " +
           text(logits.rows);
  });
  if (tokens > 0) {
    require_memory(function, "targets", targets);
    require_memory(function, "dlogits", dlogits.data);
    require_memory(function, "logps", found.logps);
  }
  require(objective.entropy.coefficient == 0 || found.entropies != nullptr, [&] {
    return function + ": entropies must have memory where entropy_coef is not 0, got none";
  });
}

}  // namespace

void launch_catalogued_tokens(const LogitsLaunch& launch, const Surrogate& surrogate,
                              const PolicyParameters& in) {
  launch_tokens_of(launch, CataloguedSurrogate(surrogate), in);
}

void LogitsLaunch::tokens(const Surrogate& surrogate, const PolicyParameters& in) const {
  kernels_of(surrogate)->tokens(*this, surrogate, in);
}

void policy_loss_of_logits(const ConstLogits& logits, const int64_t* targets,
                           const RowOptions& options, const PolicyArrays& batch,
                           const PolicyObjective& objective, const double* counts, double factor,
                           const TokensOfLogits& found, const MutableLogits& dlogits,
                           PolicyTotals* totals, void* workspace, Stream stream) {
  check_rows(kFunction, logits, options);
  require(options.ids == 0, [&] {
    return std::string(kFunction) + ": ids must be 0, as a loss of logits takes no shard, got " +
           text(options.ids);
  });
  check_objective_of_logits(batch, objective);
  check_tokens(logits, targets, batch, objective, found, dlogits, totals != nullptr);
  PolicyArrays of_tokens = batch;
  of_tokens.logps = tokens_of<ConstArray, const void>(batch.layout, found.logps);
  if (found.entropies != nullptr) {
    of_tokens.entropies = tokens_of<ConstArray, const void>(batch.layout, found.entropies);
  }
  check_supported(kFunction, of_tokens, objective);
  check_needs(kFunction, presence_of(of_tokens), objective);
  require_memory(kFunction, "workspace", workspace);
  const LogitsLaunch launch{{kFunction, batch.layout.rows, static_cast<cudaStream_t>(stream)},
                            logits,
                            targets,
                            options,
                            found,
                            dlogits};
  run_logits_policy_loss(of_tokens, objective, counts, factor,
                         reinterpret_cast<FlatTotals*>(totals),
                         PolicyWorkspace(workspace, batch.layout, objective), launch);
}

}  // namespace tether::cuda
