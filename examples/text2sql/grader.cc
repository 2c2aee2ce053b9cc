#include "examples/text2sql/grader.h"

#include <ATen/Parallel.h>

namespace text2sql {

Grader::Grader(const Task& task, Instances which) {
  for (int thread = 0; thread < at::get_num_threads(); ++thread) judges_.emplace_back(task, which);
}

std::vector<char> Grader::correct(const std::vector<const Question*>& questions,
                                  const std::vector<std::string>& sqls) {
  std::vector<char> verdicts(questions.size());
  at::parallel_for(0, static_cast<int64_t>(questions.size()), 1, [&](int64_t begin, int64_t end) {
    Judge& judge = judges_[static_cast<size_t>(at::get_thread_num())];
    for (int64_t row = begin; row < end; ++row) {
      const auto i = static_cast<size_t>(row);
      verdicts[i] = judge.correct(*questions[i], sqls[i]);
    }
  });
  return verdicts;
}

std::vector<Answer> Grader::grade(const std::vector<const Question*>& questions,
                                  const std::vector<std::vector<int32_t>>& completions,
                                  const Tokenizer& tokenizer) {
  const size_t samples = completions.size() / questions.size();
  std::vector<const Question*> asked;
  std::vector<std::string> sqls;
  for (size_t i = 0; i < completions.size(); ++i) {
    asked.push_back(questions[i / samples]);
    sqls.push_back(tokenizer.decode(completions[i]));
  }
  const std::vector<char> verdicts = correct(asked, sqls);
  std::vector<Answer> answers;
  for (size_t i = 0; i < completions.size(); ++i) {
    const bool complete = !completions[i].empty() && completions[i].back() == Tokenizer::eos;
    answers.push_back({asked[i], std::move(sqls[i]), complete && verdicts[i] != 0});
  }
  return answers;
}

}  // namespace text2sql
