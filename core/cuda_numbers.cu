#include <algorithm>

#include "core/check.h"
#include "core/cuda_doors.h"
#include "core/cuda_launch.h"
#include "core/cuda_numbers.h"

namespace tether::cuda {
namespace {

struct HeldNumbers {
  double each[3];
};

__global__ void set_numbers_kernel(const __grid_constant__ HeldNumbers numbers, double* out) {
  out[threadIdx.x] = numbers.each[threadIdx.x];
}

}  // namespace

void set_numbers(std::string_view function, const std::vector<double>& numbers, double* out,
                 Stream stream) {
  HeldNumbers held{};
  require(!numbers.empty() && numbers.size() <= std::size(held.each), [&] {
    return named(function, "numbers") + " must be 1 to 3, got " + text(numbers.size());
  });
  require_memory(function, "numbers", out);
  std::copy(numbers.begin(), numbers.end(), held.each);
  const auto count = static_cast<unsigned>(numbers.size());
  set_numbers_kernel<<<1, count, 0, static_cast<cudaStream_t>(stream)>>>(held, out);
  require_launched(function);
}

}  // namespace tether::cuda
