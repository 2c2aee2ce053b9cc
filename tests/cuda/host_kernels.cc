// tether::cuda on teams of host threads, in the place of the kernels that python/cuda_*ops.cc and
// libtorch/cuda/ call: what stands between torch and the kernels is tested on tensors of the host
// (tests/python/test_cuda.py, tests/libtorch_cuda/).

#include <algorithm>
#include <string_view>
#include <typeinfo>
#include <vector>

#include "core/cuda_numbers.h"
#include "core/type_table.h"
#include "logits/row_program.h"
#include "rl/kernels/logits_policy_calls.h"
#include "rl/kernels/loss_doors_cuda.h"
#include "rl/kernels/policy_loss_cuda.h"
#include "tests/cuda/host_surrogate.h"
#include "tests/device_types.h"

namespace tether::cuda {
namespace {

TypeTable<SurrogateKernels>& table() {
  static TypeTable<SurrogateKernels>* const all = [] {
    auto* out = new TypeTable<SurrogateKernels>;
    for_each_surrogate(
        [&]<class Formula>(Formula) { out->add(typeid(Formula), kernels_on_host<Formula>()); });
    return out;
  }();
  return *all;
}

struct Launch : HostLaunch<OneThread> {
  void rows(const Surrogate& surrogate, const PolicyParameters& in, RowTotals* out) const {
    table().find(surrogate.type())->rows(count, surrogate, in, out);
  }
};

}  // namespace

void add_kernels(std::type_index formula, const SurrogateKernels& kernels) {
  table().add(formula, kernels);
}
bool has_kernels(std::type_index formula) { return table().find(formula).has_value(); }

bool is_supported(const PolicyArrays& batch, const PolicyObjective& objective) {
  return !lacks_kernel(batch, objective);
}

void check_supported(const char* function, const PolicyArrays& batch,
                     const PolicyObjective& objective) {
  check_loss(function, batch, objective);
}

int64_t policy_workspace_bytes(const PolicyArrays& batch, const PolicyObjective& objective) {
  return PolicyWorkspace(nullptr, batch.layout, objective).bytes;
}

void local_counts(const PolicyArrays& batch, const PolicyObjective& objective, double* counts,
                  void* workspace, Stream) {
  check_supported("local_counts", batch, objective);
  check_weight_needs("local_counts", presence_of(batch), weights_that(true, objective.weights));
  const PolicyWorkspace parts(workspace, batch.layout, objective);
  const Launch launch{{batch.layout.rows}};
  run_counts(run_gates(batch, objective, parts, launch), parts, counts, launch);
}

void set_numbers(std::string_view, const std::vector<double>& numbers, double* out, Stream) {
  std::copy(numbers.begin(), numbers.end(), out);
}

void policy_loss(const PolicyArrays& batch, const PolicyObjective& objective, const double* counts,
                 double factor, const PolicyGradients& gradients, PolicyTotals* totals,
                 void* workspace, Stream) {
  run_policy_loss(batch, objective, counts, factor, gradients,
                  reinterpret_cast<FlatTotals*>(totals),
                  PolicyWorkspace(workspace, batch.layout, objective), Launch{{batch.layout.rows}});
}

void row_statistics(const ConstLogits& logits, const int64_t* targets, const RowOptions& options,
                    const RowResults& results, Stream) {
  const auto in = row_parameters<false>(logits, targets, options);
  with_device_type(logits.dtype, [&]<class Stored>(Stored) {
    for (int64_t row = 0; row < logits.rows; ++row) {
      const HostTeam<kForwardThreads> team;
      if (options.sums == RowSums::all) {
        row_statistics_program<Stored, false, true>(team, in, row, results);
      } else {
        row_statistics_program<Stored, false, false>(team, in, row, results);
      }
    }
  });
}

void row_gradients(const ConstLogits& logits, const int64_t* targets, const RowOptions& options,
                   const RowState* states, const float* dlogps, const float* dentropies,
                   const MutableLogits& dlogits, Stream) {
  const auto in = row_parameters<false>(logits, targets, options);
  with_device_type(logits.dtype, [&]<class Stored>(Stored) {
    for (int64_t row = 0; row < logits.rows; ++row) {
      row_gradient_program<Stored, false>(HostTeam<kBackwardThreads>{}, in, row, 0, 1, states,
                                          dlogps, dentropies, dlogits);
    }
  });
}

namespace {

struct LogitsLaunch : Launch {
  const ConstLogits& logits;
  const int64_t* targets;
  const RowOptions& options;
  const TokensOfLogits& found;
  const MutableLogits& dlogits;

  void tokens(const Surrogate& surrogate, const PolicyParameters& in) const {
    const CataloguedSurrogate formula(surrogate);
    const auto rows = row_parameters<false>(logits, targets, options);
    with_device_type(logits.dtype, [&]<class Stored>(Stored) {
      for (int64_t row = 0; row < logits.rows; ++row) {
        token_of_logits_program<Stored, false, kHeldVectors<Stored, false>>(
            HostCluster<kHeldThreads>{}, formula, in, rows, row, found, dlogits);
      }
    });
  }
};

}  // namespace

void policy_loss_of_logits(const ConstLogits& logits, const int64_t* targets,
                           const RowOptions& options, const PolicyArrays& batch,
                           const PolicyObjective& objective, const double* counts, double factor,
                           const TokensOfLogits& found, const MutableLogits& dlogits,
                           PolicyTotals* totals, void* workspace, Stream) {
  PolicyArrays of_tokens = batch;
  of_tokens.logps = tokens_of<ConstArray, const void>(batch.layout, found.logps);
  if (found.entropies != nullptr) {
    of_tokens.entropies = tokens_of<ConstArray, const void>(batch.layout, found.entropies);
  }
  run_logits_policy_loss(
      of_tokens, objective, counts, factor, reinterpret_cast<FlatTotals*>(totals),
      PolicyWorkspace(workspace, batch.layout, objective),
      LogitsLaunch{{{batch.layout.rows}}, logits, targets, options, found, dlogits});
}

}  // namespace tether::cuda
