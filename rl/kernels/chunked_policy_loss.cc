#include "rl/kernels/chunked_policy_loss.h"

#include <type_traits>
#include <vector>

#include "core/check.h"
#include "rl/kernels/policy_checks.h"
#include "rl/kernels/token_rows.h"

namespace tether {

// Tokens [first, first + size) of one row, of which `count` have logits.
struct ChunkedPolicyLoss::Piece {
  int64_t row, first, size, count;
  int64_t offset;  // of the token `first` in the order of places
};

namespace {

ConstArray part_of(const ConstArray& array, const RowLayout& layout, int64_t row, int64_t first) {
  ConstArray out = array;
  if (array) {
    out.data = static_cast<const char*>(array.data) +
               array.index(layout, row, first) * bytes_of(array.dtype);
  }
  return out;
}

// Arrays of `size` tokens of one row; logps and entropies are for the caller.
PolicyArrays part_of(const PolicyArrays& batch, int64_t row, int64_t first, int64_t size) {
  const auto of = [&](const ConstArray& array) { return part_of(array, batch.layout, row, first); };
  return {.layout = {.rows = 1, .columns = size},
          .logps = of(batch.logps),
          .advantages = of(batch.advantages),
          .response_mask = of(batch.response_mask),
          .old_logps = of(batch.old_logps),
          .ref_logps = of(batch.ref_logps),
          .entropies = of(batch.entropies),
          .rollout_logps = of(batch.rollout_logps),
          .token_weights = of(batch.token_weights),
          .kl_weights = of(batch.kl_weights),
          .entropy_weights = of(batch.entropy_weights)};
}

// One number that stands for an array of tokens where only its type and presence matter.
constexpr double kZero = 0;
ConstArray placeholder(DType dtype) { return {.data = &kZero, .dtype = dtype, .column_stride = 0}; }

}  // namespace

ChunkedPolicyLoss::ChunkedPolicyLoss(std::string_view function, const PolicyArrays& batch,
                                     DType arithmetic, const PolicyObjective& objective,
                                     const Normalizer& normalizer, const Executor& executor)
    : batch_(batch),
      arithmetic_(arithmetic),
      objective_(objective),
      by_row_(objective.aggregation.mode == Aggregation::Mode::sequence_mean_token_mean),
      executor_(executor) {
  require(objective.level == RatioLevel::token, [&] {
    return std::string(function) + ": level must be token for chunks of logits, got " +
           std::string(kRatioLevelNames[static_cast<size_t>(objective.level)]);
  });
  require(is_per_token(objective), [&] {
    return std::string(function) + ": weights must be of the token for chunks of logits";
  });
  batch_.logps = placeholder(arithmetic);
  if (objective.entropy.coefficient != 0) batch_.entropies = placeholder(arithmetic);
  check_call(function, batch_, objective, {});
  gated_ = GatedMask(function, batch_, objective, executor);
  batch_ = gated_.applied_to(batch_);
  objective_.weights = weights_that(false, objective.weights);
  const TermCounts local = checked_counts(function, batch_, executor);
  const StepCounts counts = step_counts(function, normalizer, local, objective.aggregation);
  normalizer_ = {.policy = counts.policy.tokens,
                 .kl = counts.kl.tokens,
                 .sequences = counts.policy.sequences,
                 .world_size = normalizer.world_size,
                 .scale = normalizer.scale};
  // A mean over the tokens of a row is one over all tokens with the count of that row.
  if (by_row_) objective_.aggregation.mode = Aggregation::Mode::token_mean;
}

template <class T>
void ChunkedPolicyLoss::add_piece(const Piece& piece, const int64_t* places, const double* logps,
                                  const double* entropies, double* dlogps, double* dentropies) {
  // Slots between the tokens have weight 0.
  const auto size = static_cast<size_t>(piece.size);
  std::vector<T> found(size), found_entropies(size), gradient(size), entropy_gradient(size);
  const auto slot = [&](int64_t i) { return static_cast<size_t>(places[i] - piece.offset); };
  for (int64_t i = 0; i < piece.count; ++i) {
    found[slot(i)] = static_cast<T>(logps[i]);
    if (entropies != nullptr) found_entropies[slot(i)] = static_cast<T>(entropies[i]);
  }
  const bool bonus = bool(batch_.entropies);
  PolicyArrays part = part_of(batch_, piece.row, piece.first, piece.size);
  part.logps = {.data = found.data(), .dtype = arithmetic_};
  if (entropies != nullptr) part.entropies = {.data = found_entropies.data(), .dtype = arithmetic_};

  Normalizer normalizer = normalizer_;
  if (by_row_) {
    const int64_t length = batch_.layout.length(piece.row);
    const PolicyArrays row = part_of(batch_, piece.row, 0, length);
    const double tokens =
        batch_.row_tokens ? length_of(batch_, piece.row, 0) : *local_counts(row, objective_).policy;
    normalizer.policy = normalizer.kl = tokens * *normalizer.sequences;
  }
  PolicyGradients out{.logps = {.data = gradient.data(), .dtype = arithmetic_}};
  if (bonus) out.entropies = {.data = entropy_gradient.data(), .dtype = arithmetic_};
  const PolicyTotals totals = policy_loss(part, objective_, normalizer, out);
  totals_.loss += totals.loss;
  totals_.metrics.merge(totals.metrics);
  for (int64_t i = 0; i < piece.count; ++i) {
    dlogps[i] = static_cast<double>(gradient[slot(i)]);
    dentropies[i] = bonus ? static_cast<double>(entropy_gradient[slot(i)]) : 0;
  }
}

void ChunkedPolicyLoss::add(const MutableLogits& logits, const int64_t* targets,
                            const int64_t* places, const RowOptions& options, bool with_gradient,
                            double* logps, double* entropies) {
  const ConstLogits in{logits.data,       logits.dtype,  logits.rows,    logits.vocabulary,
                       logits.row_stride, logits.stride, logits.columns, logits.batch_stride};
  const auto size = static_cast<size_t>(logits.rows);
  std::vector<RowStatistics> rows(size);
  row_statistics(in, targets, options, rows.data(), executor_);
  for (size_t i = 0; i < size; ++i) {
    logps[i] = logp(rows[i], options);
    if (entropies != nullptr) entropies[i] = entropy(rows[i]);
  }
  std::vector<double> dlogps(size), dentropies(size);
  const RowLayout& layout = batch_.layout;
  int64_t row = 0;
  const auto begin_of = [&](int64_t i) {
    return layout.packed() ? layout.offset(i) : i * layout.columns;
  };
  for (int64_t i = 0; i < logits.rows;) {
    while (begin_of(row) + layout.length(row) <= places[i]) ++row;
    const int64_t begin = begin_of(row), end = begin + layout.length(row);
    int64_t after = i + 1;
    while (after < logits.rows && places[after] < end) ++after;
    const Piece piece{row, places[i] - begin, places[after - 1] - places[i] + 1, after - i,
                      places[i]};
    const double* of_piece = entropies != nullptr ? entropies + i : nullptr;
    const auto add = arithmetic_ == DType::float64 ? &ChunkedPolicyLoss::add_piece<double>
                                                   : &ChunkedPolicyLoss::add_piece<float>;
    (this->*add)(piece, places + i, logps + i, of_piece, dlogps.data() + i, dentropies.data() + i);
    i = after;
  }
  if (!with_gradient) return;
  row_gradients(in, targets, options, rows.data(), dlogps.data(), dentropies.data(), logits,
                executor_);
}

}  // namespace tether
