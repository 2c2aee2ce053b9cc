// The divergences of two rows of logits on CUDA. Nothing is kept from the forward pass: backward
// reads the rows once more.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>
#include <vector>

#include "core/check.h"
#include "logits/pair_kl_cuda.h"
#include "logits/support_cuda.h"
#include "python/cuda_arrays.h"
#include "python/functions.h"
#include "python/logits_rows.h"
#include "python/on_device.h"
#include "python/row_functions.h"

namespace tether {
namespace {

using namespace python;
using Names = std::vector<Name>;

constexpr auto kFunction = CategoricalKlFunction::kName;

// Both rows, of checked tensors.
struct Pair {
  Tensor q_owner, p_owner;
  ConstLogits q, p;
  double temperature;

  Pair(const Tensor& q_logits, const Tensor& p_logits, const Words& words)
      : q(rows_of(kFunction, "q_logits", q_logits, q_owner)),
        p(rows_of(kFunction, "p_logits", p_logits, p_owner)),
        temperature(options_of<TemperatureCall>(kFunction, words).temperature) {}
};

std::tuple<Tensor, Tensor, Tensor, Tensor> categorical_kl_forward(
    const Tensor& q, const Tensor& p, const Maybe& mask, const Maybe& support,
    const Names& option_names, const Tensor& option_values, const Names& choice_names,
    const Names& choice_values) {
  return with_public_errors([&] {
    face::check_arguments(kFunction, CategoricalKlInputs<Tensor>{q, p, mask.value_or(Tensor())});
    const Pair rows(q, p, {option_names, option_values, choice_names, choice_values});
    const Maybe active = contiguous(mask);
    std::vector<int64_t> sizes = sizes_of(q);
    sizes.pop_back();
    const auto numbers = [&] { return torch::stable::new_empty(q, sizes, ScalarType::Float); };
    const Tensor kl = numbers(), reverse_kl = numbers(), entropies = numbers();
    const auto data = [](const Tensor& each) {
      return static_cast<float*>(each.mutable_data_ptr());
    };
    const auto* is_active =
        active ? static_cast<const uint8_t*>(active->const_data_ptr()) : nullptr;
    const cuda::PairKlArrays<float> values{data(kl), data(reverse_kl), data(entropies)};
    const auto kept = kept_ids(kFunction, support, rows.q.rows);
    const OnDevice device(kFunction, q);
    if (kept) {
      cuda::support_kl(rows.q, rows.p, *kept, rows.temperature, is_active, {}, values, nullptr, {},
                       {}, device.stream);
    } else {
      cuda::logits_kl(rows.q, rows.p, rows.temperature, is_active, values, device.stream);
    }
    const Tensor statistics = torch::stable::new_empty(q, {0, kKlStatistics}, ScalarType::Double);
    return std::tuple(kl, reverse_kl, entropies, statistics);
  });
}

// upstream: [N, 3] float64, of kl, reverse_kl, entropies.
std::tuple<Tensor, Tensor> categorical_kl_backward(
    const Tensor& q, const Tensor& p, const Maybe& support, const Tensor&, const Tensor& upstream,
    const Names& option_names, const Tensor& option_values, const Names& choice_names,
    const Names& choice_values, bool with_q, bool with_p) {
  return with_public_errors([&] {
    const Pair rows(q, p, {option_names, option_values, choice_names, choice_values});
    const int64_t count = rows.q.rows;
    numbers_of<const double>(kFunction, "upstream", upstream, 3 * count);
    const Tensor columns = torch::stable::contiguous(
        torch::stable::to(torch::stable::transpose(torch::stable::view(upstream, {count, 3}), 0, 1),
                          ScalarType::Float));
    const auto* of_kl = static_cast<const float*>(columns.const_data_ptr());
    const auto memory = [&](bool wanted) {
      return torch::stable::new_empty(q, wanted ? sizes_of(q) : std::vector<int64_t>{0});
    };
    const Tensor dq = memory(with_q), dp = memory(with_p);
    const cuda::PairKlArrays<const float> arriving{of_kl, of_kl + count, of_kl + 2 * count};
    const MutableLogits dx = with_q ? writable(kFunction, dq, q) : MutableLogits{},
                        dy = with_p ? writable(kFunction, dp, q) : MutableLogits{};
    const auto kept = kept_ids(kFunction, support, count);
    const Tensor kept_logits = memory_of_kept(support, q, 2);
    const OnDevice device(kFunction, q);
    if (kept) {
      cuda::support_kl(rows.q, rows.p, *kept, rows.temperature, nullptr, arriving, {},
                       static_cast<float*>(kept_logits.mutable_data_ptr()), dx, dy, device.stream);
    } else {
      cuda::logits_kl_gradients(rows.q, rows.p, rows.temperature, nullptr, arriving, {}, dx, dy,
                                device.stream);
    }
    return std::tuple(dq, dp);
  });
}

}  // namespace
}  // namespace tether

STABLE_TORCH_LIBRARY_IMPL(tether, CUDA, library) {
  library.impl("categorical_kl_forward", TORCH_BOX(&tether::categorical_kl_forward));
  library.impl("categorical_kl_backward", TORCH_BOX(&tether::categorical_kl_backward));
}
