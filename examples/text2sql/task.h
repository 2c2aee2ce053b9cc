#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "examples/text2sql/judge.h"
#include "examples/text2sql/questions.h"

namespace text2sql {

struct TaskOptions {
  uint64_t seed = 0;
  int log_questions = 6000;
  int practice_questions = 4000;
  int held_out_questions = 400;
  int reward_instances = 6;
  int evaluation_instances = 16;
};

// The whole world of the example. The same options give the same task on every platform.
class Task {
 public:
  explicit Task(const TaskOptions& options);

  const std::vector<Question>& log() const { return log_; }            // split log, with logged_sql
  const std::vector<Question>& practice() const { return practice_; }  // splits log and reward
  const std::vector<Question>& held_out() const { return held_out_; }  // split held_out

  // The share of logged labels that are right on the evaluation instances; takes seconds.
  double log_accuracy() const;

  size_t compositions() const { return grammar_.compositions().size(); }
  const Grammar& grammar() const { return grammar_; }
  const TaskOptions& options() const { return options_; }

  // CREATE and INSERT statements of every instance; the two sets are disjoint.
  const std::vector<std::string>& instance_scripts(Instances which) const;

  // Questions and labels of the log, and the questions to practise: what a tokenizer may see.
  std::vector<std::string> corpus() const;

 private:
  TaskOptions options_;
  Grammar grammar_;
  std::vector<std::string> reward_scripts_;
  std::vector<std::string> evaluation_scripts_;
  std::vector<Question> log_;
  std::vector<Question> practice_;
  std::vector<Question> held_out_;
};

}  // namespace text2sql
