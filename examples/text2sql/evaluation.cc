#include "examples/text2sql/evaluation.h"

#include "examples/text2sql/sampler.h"

namespace text2sql {

std::vector<Answer> greedy_answers(Transformer& model, const std::vector<Question>& questions,
                                   const Tokenizer& tokenizer, Grader& grader) {
  std::vector<const Question*> asked;
  std::vector<Ids> prompts;
  for (const Question& question : questions) {
    asked.push_back(&question);
    prompts.push_back(tokenizer.prompt(question.text));
  }
  return grader.grade(asked, sample(model, prompts, {.greedy = true}), tokenizer);
}

Accuracy accuracy_of(const std::vector<Answer>& answers) {
  Accuracy accuracy;
  for (const Answer& answer : answers) accuracy.add(answer.question->tables, answer.correct);
  return accuracy;
}

}  // namespace text2sql
