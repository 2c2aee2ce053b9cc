#include "bench/gpu/door.h"
#include "core/check.h"
#include "estimators/advantage/catalogue.h"
#include "estimators/advantage/row_scan.h"
#include "estimators/advantage/row_scan_cuda.h"

// Estimators on the GPU, and beside them the CPU kernels.

namespace tether {
namespace {

Recursion recursion_of(std::string_view name, bool decay, double gamma, double lambda) {
  Recursion out = first_recursion();
  for (size_t i = 0; i < kRecursionNames.size(); ++i) {
    if (kRecursionNames[i] == name) choose(out, i);
  }
  out.for_each_field([&](std::string_view field, double& value, const Range&) {
    if (field == "gamma") value = gamma;
    if (field == "lambda") value = lambda;
  });
  out.for_each_choice([&](std::string_view, FormulaChoice choice, auto) { choose(choice, decay); });
  return out;
}

}  // namespace
}  // namespace tether

using namespace tether;

extern "C" {

const char* tether_recursions() {
  static const std::string names = spaced(kRecursionNames);
  return names.c_str();
}

// data: rewards, values, log_ratios, each [rows, columns]; mask and done too.
const char* tether_scan_rows(const char* name, int64_t decay, int64_t rows, int64_t columns,
                             const float* const* data, const uint8_t* mask, const uint8_t* done,
                             double gamma, double lambda, float* advantages, float* returns,
                             int64_t on_device, void* stream) {
  return text_of_error([&] {
    const auto tokens = [&](const void* memory, DType dtype) {
      return ConstArray{memory, dtype, columns, 1};
    };
    const auto out = [&](float* memory) {
      return MutableArray{memory, DType::float32, columns, 1};
    };
    const AdvantageArrays batch{.layout = {.rows = rows, .columns = columns},
                                .rewards = tokens(data[0], DType::float32),
                                .values = tokens(data[1], DType::float32),
                                .response_mask = tokens(mask, DType::boolean),
                                .done = tokens(done, DType::boolean),
                                .log_ratios = tokens(data[2], DType::float32)};
    const Recursion recursion = recursion_of(name, decay != 0, gamma, lambda);
    if (on_device != 0) {
      cuda::scan_rows("gpu", batch, recursion, out(advantages), out(returns), stream);
    } else {
      scan_rows("gpu", batch, recursion, out(advantages), out(returns));
    }
  });
}

}  // extern "C"
