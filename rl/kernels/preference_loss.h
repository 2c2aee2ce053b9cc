#pragma once

#include <string_view>

#include "../../core/parallel.h"
#include "../preference_objective.h"
#include "arrays.h"

namespace tether {

// The loss of a batch of answers, its metrics, and d loss / d logps where `dlogps` is given (0 in
// masked slots); the same bits for every executor. A pair without tokens on both sides, or an
// answer without any, is padding: it adds nothing and is not counted. Allocates a few numbers a
// row.
//
// Throws Error before anything is written: an array that is missing or has no memory or no type, an
// odd number of rows without labels, labels for a loss of pairs or none for one of single answers,
// an option out of range, no reference where one is needed, a weight or label outside [0, 1], a
// count in `normalizer` that is no positive number.
PreferenceTotals preference_loss(const PreferenceArrays& batch,
                                 const PreferenceObjective& objective,
                                 const PairNormalizer& normalizer, const MutableArray& dlogps,
                                 const Executor& executor = {});

// How far rounding may lift the score of an answer above that of a certain one, where a link takes
// log-probabilities.
inline constexpr double kLogProbabilityRounding = 1e-3;

// Answers without labels are pairs.
void check_rows(std::string_view function, bool has_labels, int64_t rows);

// What the objective needs of a batch with so many rows.
void check_needs(std::string_view function, const PreferenceInputs<bool>& given, int64_t rows,
                 const PreferenceObjective& objective);

// Throws where a denominator is no count, or where the pairs of the step are given but not the
// tokens that a likelihood divides by. A count of 0 is looked at beside the batch.
void check_denominators(std::string_view function, const PairNormalizer& normalizer,
                        const PreferenceObjective& objective);

// The pairs, or answers with labels, and the tokens of the NLL of this batch: what the caller adds
// up over an optimizer step.
PairNormalizer local_counts(const PreferenceArrays& batch, const Executor& executor = {});

}  // namespace tether
