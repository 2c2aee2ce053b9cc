// linear_policy_loss on CUDA tensors, by chunks of logits: the operator of one chunk (cuda_ops.cc).

#include <torch/csrc/stable/library.h>

#include <string_view>
#include <vector>

#include "core/check.h"
#include "python/cuda_arrays.h"
#include "python/functions.h"
#include "python/logits_rows.h"
#include "python/loss_functions.h"
#include "python/on_device.h"
#include "python/row_functions.h"
#include "rl/kernels/logits_policy_loss_cuda.h"

namespace tether {
namespace {

using namespace python;
using Names = std::vector<Name>;

// Logits [C, V] of the tokens `first`, `first` + 1 ... become the gradient of the loss there, and
// what they give goes into logps and entropies, [N] in float32. targets: [N]; counts: [3], of the
// step. The loss itself is policy_loss of the log-probabilities of all chunks.
void policy_gradient_of_logits(Tensor logits, const Tensor& targets, int64_t first,
                               const Tensor& advantages, const Tensor& response_mask,
                               const Maybe& old_logps, const Maybe& ref_logps,
                               const Maybe& rollout_logps, const Maybe& token_weights,
                               const Maybe& kl_weights, const Maybe& entropy_weights,
                               const Maybe& row_tokens, const Maybe& offsets,
                               const Names& option_names, const Tensor& option_values,
                               const Names& choice_names, const Names& choice_values,
                               const Names& row_names, const Tensor& row_values,
                               const Names& row_choice_names, const Names& row_choice_values,
                               const Tensor& counts, Tensor logps, const Maybe& entropies) {
  with_public_errors([&] {
    constexpr const char* function = "linear_policy_loss";
    const auto given = [](const Maybe& each) { return each.value_or(Tensor()); };
    const int64_t tokens = response_mask.numel();
    const PolicyInputs<Tensor> batch{
        .logps = torch::stable::new_empty(response_mask, sizes_of(response_mask),
                                          ScalarType::Float),  // stands for those made here
        .advantages = advantages,
        .response_mask = response_mask,
        .old_logps = given(old_logps),
        .ref_logps = given(ref_logps),
        .rollout_logps = given(rollout_logps),
        .token_weights = given(token_weights),
        .kl_weights = given(kl_weights),
        .entropy_weights = given(entropy_weights),
        .row_tokens = given(row_tokens),
        .offsets = given(contiguous(offsets))};
    face::check_arguments(function, batch);
    PolicyArrays arrays = device_arrays(batch);
    arrays.logps = {};
    const auto options = options_of<PolicyOptions>(
        function, {option_names, option_values, choice_names, choice_values});
    const RowOptions row_options =
        options_of<RowCall>(function, {row_names, row_values, row_choice_names, row_choice_values})
            .options();
    Tensor owner;
    const ConstLogits rows = rows_of(function, "logits", logits, owner);
    require(first >= 0 && first <= tokens - rows.rows,
            [] { return named(function, "logits") + " must be those of tokens of the batch"; });
    const auto numbers = [&](std::string_view name, const Tensor& tensor) {
      require(tensor.scalar_type() == ScalarType::Float && tensor.is_contiguous() &&
                  tensor.numel() == tokens,
              [&] { return named(function, name) + " must be float32, one for each token"; });
      return static_cast<float*>(tensor.mutable_data_ptr());
    };
    const cuda::TokensOfLogits found{numbers("logps", logps),
                                     entropies ? numbers("entropies", *entropies) : nullptr, first};
    const int64_t bytes = cuda::policy_workspace_bytes(arrays, options.objective);
    const Tensor memory = new_doubles_on(logits, (bytes + 7) / 8);
    const OnDevice device(function, logits);
    cuda::policy_loss_of_logits(
        rows, ids_of(function, "targets", targets, tokens) + first, row_options, arrays,
        options.objective, numbers_of<const double>(function, "counts", counts, 3),
        options.normalizer.factor(), found, writable(function, logits, logits), nullptr,
        memory.mutable_data_ptr(), device.stream);
  });
}

}  // namespace
}  // namespace tether

STABLE_TORCH_LIBRARY_FRAGMENT(tether, library) {
  library.def(tether::python::with_words(
                  "policy_gradient_of_logits(Tensor(a!) logits, Tensor targets, int first, "
                  "Tensor advantages, Tensor response_mask, Tensor? old_logps, Tensor? ref_logps, "
                  "Tensor? rollout_logps, Tensor? token_weights, Tensor? kl_weights, "
                  "Tensor? entropy_weights, Tensor? row_tokens, Tensor? offsets, WORDS, "
                  "str[] row_names, Tensor row_values, str[] row_choice_names, "
                  "str[] row_choice_values, Tensor counts, Tensor(b!) logps, "
                  "Tensor(c!)? entropies) -> ()")
                  .c_str());
}

STABLE_TORCH_LIBRARY_IMPL(tether, CUDA, library) {
  library.impl("policy_gradient_of_logits", TORCH_BOX(&tether::policy_gradient_of_logits));
}
