#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "examples/text2sql/judge.h"
#include "examples/text2sql/task.h"
#include "examples/text2sql/tokenizer.h"

namespace text2sql {

// Points into the Task's questions.
struct Answer {
  const Question* question = nullptr;
  std::string sql;
  bool correct = false;
};

// Judges many answers at once, with one Judge per thread of torch's pool.
class Grader {
 public:
  Grader(const Task& task, Instances which);

  // Does sqls[i] answer *questions[i]?
  std::vector<char> correct(const std::vector<const Question*>& questions,
                            const std::vector<std::string>& sqls);

  // Completion i * k + j answers question i, with k = completions / questions. A completion that
  // was cut before its <eos> is wrong, whatever it says.
  std::vector<Answer> grade(const std::vector<const Question*>& questions,
                            const std::vector<std::vector<int32_t>>& completions,
                            const Tokenizer& tokenizer);

 private:
  std::vector<Judge> judges_;
};

}  // namespace text2sql
