// linear_policy_loss on CUDA tensors, by chunks of logits: the operator of one chunk (cuda_ops.cc).

#include <torch/csrc/stable/library.h>

#include <string>
#include <string_view>

#include "core/check.h"
#include "face/device_arrays.h"
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
constexpr const char* kFunction = "linear_policy_loss";

struct Chunk {
  Tensor logits, targets;
  int64_t first;
  PolicyInputs<Tensor> batch;
  Words words, row_words;
  Tensor counts, logps;
  Maybe entropies;

  explicit Chunk(Arguments arguments) {
    for (Tensor* each : {&logits, &targets}) *each = arguments.next<Tensor>();
    first = arguments.next<int64_t>();
    arguments.arrays(batch, kOfLogits);
    words = arguments.words();
    row_words = arguments.words();
    for (Tensor* each : {&counts, &logps}) *each = arguments.next<Tensor>();
    entropies = arguments.next<Maybe>();
    // Stands for the log-probabilities that are made here.
    batch.logps = torch::stable::new_empty(batch.response_mask, sizes_of(batch.response_mask),
                                           ScalarType::Float);
  }

  int64_t tokens() const { return batch.response_mask.numel(); }
  // Where what the kernel finds goes.
  float* memory(std::string_view name, const Tensor& tensor) const {
    require(tensor.scalar_type() == ScalarType::Float && tensor.is_contiguous() &&
                tensor.numel() == tokens(),
            [&] { return named(kFunction, name) + " must be float32, one for each token"; });
    return static_cast<float*>(tensor.mutable_data_ptr());
  }
};

// Logits [C, V] of the tokens `first`, `first` + 1 ... become the gradient of the loss there, and
// what they give goes into logps and entropies, [N] in float32. targets: [N]; counts: [3], of the
// step. The loss itself is policy_loss of the log-probabilities of all chunks.
void run(const Chunk& chunk) {
  face::check_arguments(kFunction, chunk.batch);
  PolicyArrays arrays = face::device_arrays(chunk.batch);
  arrays.logps = {};
  const auto options = options_of<PolicyOptions>(kFunction, chunk.words);
  const RowOptions row_options = options_of<RowCall>(kFunction, chunk.row_words).options();
  Tensor owner;
  const ConstLogits rows = rows_of(kFunction, "logits", chunk.logits, owner);
  require(chunk.first >= 0 && chunk.first <= chunk.tokens() - rows.rows,
          [] { return named(kFunction, "logits") + " must be those of tokens of the batch"; });
  const cuda::TokensOfLogits found{
      chunk.memory("logps", chunk.logps),
      chunk.entropies ? chunk.memory("entropies", *chunk.entropies) : nullptr, chunk.first};
  const int64_t bytes = cuda::policy_workspace_bytes(arrays, options.objective);
  const Tensor memory = new_doubles_on(chunk.logits, (bytes + 7) / 8);
  const OnDevice device(kFunction, chunk.logits);
  cuda::policy_loss_of_logits(
      rows, ids_of(kFunction, "targets", chunk.targets, chunk.tokens()) + chunk.first, row_options,
      arrays, options.objective, numbers_of<const double>(kFunction, "counts", chunk.counts, 3),
      options.normalizer.factor(), found, writable(kFunction, chunk.logits, chunk.logits), nullptr,
      memory.mutable_data_ptr(), device.stream);
}

void policy_gradient_of_logits(StableIValue* stack, uint64_t, uint64_t) {
  with_public_errors([&] { run(Chunk(Arguments(stack))); });
}

std::string schema() {
  const std::string arrays = schema_of_arrays<PolicyInputs<Tensor>>(kOfLogits);
  return with_words("policy_gradient_of_logits(Tensor(a!) logits, Tensor targets, int first, " +
                    arrays +
                    "WORDS, str[] row_names, Tensor row_values, str[] row_choice_names, "
                    "str[] row_choice_values, Tensor counts, Tensor(b!) logps, "
                    "Tensor(c!)? entropies) -> ()");
}

}  // namespace
}  // namespace tether

STABLE_TORCH_LIBRARY_FRAGMENT(tether, library) { library.def(tether::schema().c_str()); }

STABLE_TORCH_LIBRARY_IMPL(tether, CUDA, library) {
  library.impl("policy_gradient_of_logits", &tether::policy_gradient_of_logits);
}
