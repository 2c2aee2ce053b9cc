#pragma once

#include <vector>

#include "examples/text2sql/grader.h"
#include "examples/text2sql/model.h"
#include "examples/text2sql/run_state.h"

namespace text2sql {

// The model's likeliest answer to every question, graded.
std::vector<Answer> greedy_answers(Transformer& model, const std::vector<Question>& questions,
                                   const Tokenizer& tokenizer, Grader& grader);

Accuracy accuracy_of(const std::vector<Answer>& answers);

}  // namespace text2sql
