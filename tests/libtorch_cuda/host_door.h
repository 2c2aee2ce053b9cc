#pragma once

#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <string>
#include <vector>

#include "libtorch/cuda/kernels.h"

// The way of CUDA tensors through the LibTorch face, on tensors of the host: its kernels are teams
// of host threads (tests/cuda/host_*.cc).

namespace tether {

// As long as it lives, every tensor counts as one on CUDA.
class OnCuda {
 public:
  OnCuda();
  explicit OnCuda(const detail::CudaKernels& kernels);
  ~OnCuda();
  OnCuda(const OnCuda&) = delete;

  int taken() const;  // calls that had a kernel
};

// The kernels, of which those for rows of logits do nothing: they take tensors without memory.
inline detail::CudaKernels without_rows() {
  detail::CudaKernels out = detail::kCudaKernels;
  out.row_statistics = [](const at::Tensor&, const at::Tensor&, const at::Tensor&,
                          const RowOptions&, const detail::RowsOnDevice&) {};
  out.row_gradients = [](const at::Tensor&, const at::Tensor&, const at::Tensor&, const RowOptions&,
                         const at::Tensor&, const detail::RowUpstreams&, const at::Tensor&) {};
  return out;
}

using Results = std::vector<at::Tensor>;

inline void expect_same(const Results& got, const Results& want, double tolerance,
                        const std::string& name) {
  ASSERT_EQ(got.size(), want.size()) << name;
  for (size_t i = 0; i < want.size(); ++i) {
    ASSERT_EQ(got[i].defined(), want[i].defined()) << name << ", result " << i;
    if (!want[i].defined()) continue;
    ASSERT_EQ(got[i].sizes(), want[i].sizes()) << name << ", result " << i;
    ASSERT_EQ(got[i].scalar_type(), want[i].scalar_type()) << name << ", result " << i;
    EXPECT_TRUE(at::allclose(got[i], want[i], tolerance, tolerance, /*equal_nan=*/true))
        << name << ", result " << i << ": " << (got[i] - want[i]).abs().max().item<double>();
  }
}

// What run() gives by the kernels for CUDA is what it gives by those of the CPU.
template <class Run>
void expect_as_on_cpu(Run run, int calls, double tolerance, const std::string& name) {
  const Results want = run();
  const OnCuda door;
  expect_same(run(), want, tolerance, name);
  EXPECT_EQ(door.taken(), calls) << name;
}

inline double tolerance_of(at::ScalarType type) {
  return type == at::kFloat ? 2e-5 : type == at::kDouble ? 1e-12 : 1e-2;
}

}  // namespace tether
