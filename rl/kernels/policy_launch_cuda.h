#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "policy_calls.h"

// The kernels of a policy loss (policy_calls.h) on a device, for .cu files.

namespace tether::cuda {

struct DeviceLaunch {
  const char* function;
  int64_t count;  // of rows
  cudaStream_t stream;

  void rows(const Surrogate& surrogate, const PolicyParameters& in, RowTotals* out) const;
  void weight(const TokenWeight& weight, const WeightParameters& in) const;
  void count_rows(const PolicyParameters& in, double* out) const;
  void add_rows(const RowTotals* rows, const PolicyParameters& in, FlatTotals* out) const;
  void add_counts(const double* rows, double* out) const;
};

}  // namespace tether::cuda
