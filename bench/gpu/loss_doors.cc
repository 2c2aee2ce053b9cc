#include <string_view>
#include <vector>

#include "bench/gpu/door.h"
#include "core/check.h"
#include "rl/catalogue.h"
#include "rl/kernels/preference_loss.h"
#include "rl/kernels/preference_loss_cuda.h"
#include "rl/kernels/value_loss.h"
#include "rl/kernels/value_loss_cuda.h"

// Losses of value heads and of preferences on the GPU, and beside them the CPU kernels. Without a
// workspace all memory is the host's.

namespace tether {
namespace {

template <class Rows>
std::string names_of(const Rows& rows) {
  std::vector<std::string_view> out;
  for (const auto& row : rows) out.push_back(row.name);
  return spaced(out);
}

// data: logps, ref_logps, labels of rows.
PreferenceArrays pairs(int64_t rows, int64_t columns, const float* const* data, const uint8_t* mask,
                       bool with_labels) {
  const auto tokens = [&](const float* memory) {
    return ConstArray{memory, DType::float32, columns, 1};
  };
  PreferenceArrays out{.layout = {.rows = rows, .columns = columns},
                       .logps = tokens(data[0]),
                       .ref_logps = tokens(data[1]),
                       .response_mask = {mask, DType::boolean, columns, 1}};
  if (with_labels) {
    out.labels = {.data = data[2], .dtype = DType::float32, .row_stride = 1, .per_row = true};
  }
  return out;
}

ValueArrays values(int64_t rows, int64_t columns, const float* const* data, const uint8_t* mask) {
  const auto tokens = [&](const float* memory) {
    return ConstArray{memory, DType::float32, columns, 1};
  };
  return {.layout = {.rows = rows, .columns = columns},
          .values = tokens(data[0]),
          .returns = tokens(data[1]),
          .response_mask = {mask, DType::boolean, columns, 1},
          .old_values = tokens(data[2])};
}

}  // namespace
}  // namespace tether

using namespace tether;

extern "C" {

const char* tether_preference_objectives() {
  static const std::string names = names_of(kPreferenceCatalogue);
  return names.c_str();
}
const char* tether_value_objectives() {
  static const std::string names = names_of(kValueCatalogue);
  return names.c_str();
}

// The larger workspace of the two.
int64_t tether_loss_workspace_bytes(int64_t rows, int64_t columns) {
  const float* none[3] = {};
  return std::max(cuda::preference_workspace_bytes(pairs(rows, columns, none, nullptr, false)),
                  cuda::value_workspace_bytes(values(rows, columns, none, nullptr)));
}
int64_t tether_loss_totals_bytes() {
  return std::max(sizeof(PreferenceTotals), sizeof(ValueTotals));
}

const char* tether_preference_loss(const char* objective, int64_t rows, int64_t columns,
                                   const float* const* data, const uint8_t* mask, float* dlogps,
                                   void* totals, void* workspace, void* stream) {
  return text_of_error([&] {
    const PreferenceObjective loss = preference_preset("gpu", objective);
    const PreferenceArrays batch = pairs(rows, columns, data, mask, loss.loss.takes_labels());
    const MutableArray to{dlogps, DType::float32, columns, 1};
    auto* out = static_cast<PreferenceTotals*>(totals);
    if (workspace == nullptr) {
      *out = preference_loss(batch, loss, {}, to);
    } else {
      cuda::preference_loss(batch, loss, nullptr, 1, to, out, workspace, stream);
    }
  });
}

// data: values, returns, old_values, each [rows, columns].
const char* tether_value_loss(const char* objective, int64_t rows, int64_t columns,
                              const float* const* data, const uint8_t* mask, float* dvalues,
                              void* totals, void* workspace, void* stream) {
  return text_of_error([&] {
    const ValueObjective loss = value_preset("gpu", objective);
    const ValueArrays batch = values(rows, columns, data, mask);
    const MutableArray to{dvalues, DType::float32, columns, 1};
    auto* out = static_cast<ValueTotals*>(totals);
    if (workspace == nullptr) {
      *out = value_loss(batch, loss, {}, to);
    } else {
      cuda::value_loss(batch, loss, nullptr, 1, to, out, workspace, stream);
    }
  });
}

}  // extern "C"
