#include <string_view>

#include "core/cuda_doors.h"
#include "core/cuda_launch.h"
#include "estimators/advantage/catalogue.h"
#include "estimators/advantage/row_scan.h"
#include "estimators/advantage/row_scan_cuda.h"
#include "estimators/advantage/row_scan_program.h"

namespace tether::cuda {
namespace {

template <class Formula>
__global__ __launch_bounds__(kScanThreads,
                             4) void scan_kernel(Formula formula,
                                                 const __grid_constant__ ScanParameters in,
                                                 int64_t first) {
  row_scan_program(DeviceTeam<kScanThreads>{}, formula, in, first + blockIdx.x);
}

void check(std::string_view function, const AdvantageArrays& batch, const Recursion& recursion,
           const MutableArray& advantages, const MutableArray& returns) {
  check_formula(function, recursion);
  check_device_inputs(function, batch, Numbers::wide);
  check_reads(function, presence_of(batch), recursion);
  check_device_result(function, "advantages", advantages, Numbers::wide, batch.layout);
  check_device_result(function, "returns", returns, Numbers::wide, batch.layout);
  require_kernel(chosen(recursion) < kRecursionNames.size(), function,
                 "estimator must be one of the catalogue", "another type");
}

}  // namespace

void scan_rows(std::string_view function, const AdvantageArrays& batch, const Recursion& recursion,
               const MutableArray& advantages, const MutableArray& returns, Stream stream) {
  check(function, batch, recursion, advantages, returns);
  const auto in = scan_parameters(batch, recursion, advantages, returns);
  for_each_recursion([&]<class Formula>(const FormulaRow<Formula>&) {
    const Formula* formula = recursion.target<Formula>();
    if (formula == nullptr) return;
    launch_tasks(function, batch.layout.rows, 1, [&](int64_t first, unsigned blocks) {
      scan_kernel<<<blocks, kScanThreads, 0, static_cast<cudaStream_t>(stream)>>>(*formula, in,
                                                                                  first);
    });
  });
}

}  // namespace tether::cuda
