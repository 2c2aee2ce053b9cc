#pragma once

#include <cstdint>
#include <string_view>
#include <vector>

#include "../../core/parallel.h"
#include "../preference_objective.h"
#include "arrays.h"

namespace tether {

// What the tokens of an answer add up to.
struct AnswerSums {
  double n = 0;         // weights of the response mask
  double logp = 0;      // by them
  double score = 0;     // logp, or logp - ref_logp, by the weights of the score
  double nll_n = 0;     // weights of the NLL
  double nll_logp = 0;  // by them
};

// d loss / d logp of its tokens, over their weights of the score and of the NLL.
struct AnswerSlopes {
  double score = 0;
  double nll = 0;
};

// The sums of every row; a mask that is no mask throws in the name of `function`. Of an objective
// without an NLL those of the NLL are of no mask of its own.
std::vector<AnswerSums> answer_sums(std::string_view function, const PreferenceArrays& batch,
                                    const PreferenceObjective& objective, const Executor& executor);

// The gradient of every token, from the slopes of its row; 0 in masked slots.
void store_gradients(const PreferenceArrays& batch, const PreferenceObjective& objective,
                     const std::vector<AnswerSlopes>& slopes, const MutableArray& dlogps,
                     const Executor& executor);

}  // namespace tether
