#include <algorithm>
#include <vector>

#include "bench/gpu/door.h"
#include "core/check.h"
#include "estimators/advantage/catalogue.h"
#include "estimators/advantage/groups.h"
#include "estimators/advantage/groups_cuda.h"
#include "estimators/advantage/row_scan.h"
#include "estimators/advantage/row_scan_cuda.h"
#include "estimators/advantage/whitening_cuda.h"

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

const char* tether_group_rules() {
  static const std::string names = spaced(kGroupRuleNames);
  return names.c_str();
}

// In groups of `group_size`, or by ids where it is 0.
const char* tether_group_advantage(const char* name, int64_t count, int64_t group_size,
                                   const float* rewards, const int64_t* ids, const float* lengths,
                                   float* advantages, int64_t on_device, void* stream) {
  return text_of_error([&] {
    GroupRule rule = first_group_rule();
    for (size_t i = 0; i < kGroupRuleNames.size(); ++i) {
      if (kGroupRuleNames[i] == std::string_view(name)) choose(rule, i);
    }
    if (group_size > 0) ids = nullptr;
    if (on_device != 0) {
      const cuda::GroupBatch batch{rewards, ids, lengths, group_size, count};
      cuda::advantages_of_groups("gpu", batch, rule, advantages, stream);
      return;
    }
    const std::vector<double> in(rewards, rewards + count), tokens(lengths, lengths + count);
    std::vector<double> out(in.size());
    advantages_of_groups("gpu", {in.data(), ids, tokens.data(), group_size, count}, rule,
                         out.data());
    std::transform(out.begin(), out.end(), advantages,
                   [](double each) { return static_cast<float>(each); });
  });
}

int64_t tether_moments_bytes(int64_t rows, int64_t columns) {
  return cuda::moments_workspace({.rows = rows, .columns = columns}) *
         static_cast<int64_t>(sizeof(Moments));
}

// Whitening by the moments of this batch itself.
const char* tether_whiten(int64_t rows, int64_t columns, const float* values, const uint8_t* mask,
                          void* workspace, float* out, int64_t on_device, void* stream) {
  return text_of_error([&] {
    const WhiteningArrays batch{{.rows = rows, .columns = columns},
                                {values, DType::float32, columns, 1},
                                {mask, DType::boolean, columns, 1}};
    const MutableArray to{out, DType::float32, columns, 1};
    if (on_device == 0) {
      whiten(batch, moments(batch), {}, to);
      return;
    }
    auto* parts = static_cast<Moments*>(workspace);
    cuda::moments(batch, parts, parts, stream);
    cuda::whiten(batch, parts, {}, to, stream);
  });
}

}  // extern "C"
