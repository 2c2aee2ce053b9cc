#include <string_view>
#include <vector>

#include "bench/gpu/door.h"
#include "core/check.h"
#include "logits/rows_cuda.h"
#include "rl/catalogue.h"
#include "rl/kernels/logits_policy_loss_cuda.h"
#include "rl/kernels/policy_loss.h"
#include "rl/kernels/policy_loss_cuda.h"

// Rows of logits and policy losses on the GPU, and beside them the CPU kernel of the latter.

namespace tether {
namespace {

PolicyArrays arrays(int64_t rows, int64_t columns, const float* const* data, const uint8_t* mask) {
  const auto view = [&](const float* memory) {
    return ConstArray{memory, DType::float32, columns, 1};
  };
  return {.layout = {.rows = rows, .columns = columns},
          .logps = view(data[0]),
          .advantages = view(data[4]),
          .response_mask = {mask, DType::boolean, columns, 1},
          .old_logps = view(data[1]),
          .ref_logps = view(data[2]),
          .rollout_logps = view(data[3])};
}

// A row of the catalogue; by the name of a level of turns GRPO there, with weights of turns.
PolicyObjective objective_of(std::string_view name) {
  for (size_t i = 0; i < kLevelRules.size(); ++i) {
    if (kLevelRules[i].segment != Segment::turn || kLevelRules[i].name != name) continue;
    PolicyObjective out = presets::grpo(0.04);
    out.level = static_cast<RatioLevel>(i);
    out.weights = {TokenWeight(RatioGate{.high = 1.04}, WeightLevel::turn_max),
                   TokenWeight(TruncatedImportance{.high = 1.005}, WeightLevel::turn_mean)};
    return out;
  }
  return preset("gpu", name);
}

}  // namespace
}  // namespace tether

using namespace tether;

extern "C" {

// `dtype`: 1 float32, 3 bfloat16, 4 float16, as DType.
const char* tether_row_statistics(const void* logits, int dtype, int64_t rows, int64_t vocabulary,
                                  int64_t row_stride, const int64_t* targets, double temperature,
                                  double softcap, void* states, float* logps, float* entropies,
                                  void* stream) {
  return text_of_error([&] {
    cuda::row_statistics(
        {logits, static_cast<DType>(dtype), rows, vocabulary, row_stride}, targets,
        {.temperature = temperature, .softcap = softcap},
        {.states = static_cast<cuda::RowState*>(states), .logps = logps, .entropies = entropies},
        stream);
  });
}

const char* tether_row_gradients(const void* logits, int dtype, int64_t rows, int64_t vocabulary,
                                 int64_t row_stride, const int64_t* targets, double temperature,
                                 double softcap, const void* states, const float* dlogps,
                                 const float* dentropies, void* dlogits, int64_t out_stride,
                                 void* stream) {
  return text_of_error([&] {
    const auto type = static_cast<DType>(dtype);
    cuda::row_gradients({logits, type, rows, vocabulary, row_stride}, targets,
                        {.temperature = temperature, .softcap = softcap},
                        static_cast<const cuda::RowState*>(states), dlogps, dentropies,
                        {dlogits, type, rows, vocabulary, out_stride}, stream);
  });
}

const char* tether_objectives() {
  static const std::string names = [] {
    std::vector<std::string_view> out;
    for (const CatalogueRow& row : kCatalogue) out.push_back(row.name);
    for (const LevelRule& rule : kLevelRules) {
      if (rule.segment == Segment::turn) out.push_back(rule.name);
    }
    return spaced(out);
  }();
  return names.c_str();
}

// For every objective: those of turns ask for most.
int64_t tether_policy_workspace_bytes(int64_t rows, int64_t columns) {
  const float* none[5] = {};
  return cuda::policy_workspace_bytes(arrays(rows, columns, none, nullptr),
                                      objective_of("turn_mean"));
}

int64_t tether_policy_totals_bytes() { return sizeof(PolicyTotals); }

// data: logps, old_logps, ref_logps, rollout_logps, advantages, each [rows, columns]. Without a
// workspace all memory is the host's.
const char* tether_policy_loss(const char* objective, int64_t rows, int64_t columns,
                               const float* const* data, const uint8_t* mask, float* dlogps,
                               void* totals, void* workspace, void* stream) {
  return text_of_error([&] {
    const PolicyArrays batch = arrays(rows, columns, data, mask);
    const PolicyGradients gradients{.logps = {dlogps, DType::float32, columns, 1}};
    auto* out = static_cast<PolicyTotals*>(totals);
    if (workspace == nullptr) {
      *out = policy_loss(batch, objective_of(objective), {}, gradients);
    } else {
      cuda::policy_loss(batch, objective_of(objective), nullptr, 1, gradients, out, workspace,
                        stream);
    }
  });
}

// data: those of tether_policy_loss but for the logps, in their order. dlogits: strides as logits.
const char* tether_policy_loss_of_logits(const char* objective, double entropy_coefficient,
                                         int64_t rows, int64_t columns, const void* logits,
                                         int dtype, int64_t vocabulary, int64_t row_stride,
                                         const int64_t* targets, double temperature, double softcap,
                                         const float* const* data, const uint8_t* mask,
                                         float* logps, float* entropies, void* dlogits,
                                         void* totals, void* workspace, void* stream) {
  return text_of_error([&] {
    const float* const all[] = {nullptr, data[0], data[1], data[2], data[3]};
    PolicyArrays batch = arrays(rows, columns, all, mask);
    batch.logps = {};
    PolicyObjective chosen = objective_of(objective);
    chosen.entropy.coefficient = entropy_coefficient;
    const auto type = static_cast<DType>(dtype);
    cuda::policy_loss_of_logits({logits, type, rows * columns, vocabulary, row_stride}, targets,
                                {.temperature = temperature, .softcap = softcap}, batch, chosen,
                                nullptr, 1, {logps, entropies},
                                {dlogits, type, rows * columns, vocabulary, row_stride},
                                static_cast<PolicyTotals*>(totals), workspace, stream);
  });
}

}  // extern "C"
