#pragma once

#include <cstdint>
#include <optional>

#include "../../core/cuda_launch.h"
#include "../../logits/logits.h"
#include "../../logits/statistics.h"
#include "logits_policy_loss_cuda.h"
#include "policy_calls.h"
#include "surrogate_table.h"
#include "turn_program.h"

// The kernels of a policy loss (policy_calls.h) on a device, for .cu files.

namespace tether::cuda {

struct DeviceLaunch {
  const char* function;
  int64_t count;  // of rows
  cudaStream_t stream;

  void rows(const Surrogate& surrogate, const PolicyParameters& in, RowTotals* out) const;
  void weight(const TokenWeight& weight, const WeightParameters& in) const;
  void turns(const TurnParameters& in) const;
  void turn_statistics(const WeightParameters& in) const;
  void turn_ratios(const PolicyParameters& in) const;
  void turn_gradients(const PolicyParameters& in) const;
  void count_rows(const PolicyParameters& in, double* out) const;
  void add_rows(const RowTotals* rows, const PolicyParameters& in, FlatTotals* out) const;
  void add_counts(const double* rows, double* out) const;
};

struct LogitsLaunch : DeviceLaunch {
  const ConstLogits& logits;
  const int64_t* targets;
  const RowOptions& options;
  const TokensOfLogits& found;
  const MutableLogits& dlogits;

  void tokens(const Surrogate& surrogate, const PolicyParameters& in) const;
};

// The kernels that were compiled for the formula of a surrogate (surrogate_cuda.h).
struct SurrogateKernels {
  void (*rows)(const DeviceLaunch&, const Surrogate&, const PolicyParameters&, RowTotals*);
  void (*tokens)(const LogitsLaunch&, const Surrogate&, const PolicyParameters&);
};

std::optional<SurrogateKernels> kernels_of(const Surrogate& surrogate);
// Those of the catalogue share a kernel.
void launch_catalogued_tokens(const LogitsLaunch& launch, const Surrogate& surrogate,
                              const PolicyParameters& in);

}  // namespace tether::cuda
