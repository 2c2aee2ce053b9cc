#include "examples/text2sql/task.h"

#include <algorithm>
#include <array>
#include <initializer_list>
#include <numeric>
#include <stdexcept>
#include <string_view>
#include <unordered_set>

#include "examples/text2sql/query_log.h"
#include "examples/text2sql/schema.h"

namespace text2sql {
namespace {

constexpr int kMostTables = 3;
constexpr int kMostFilters = 2;
constexpr std::array<double, kMostTables> kTableWeights = {3, 4, 3};
constexpr std::array<double, kMostFilters + 1> kFilterWeights = {1, 4, 2};
constexpr int kEnoughInstances = 2;  // on which the gold result must be informative
constexpr int kMostDraws = 1000;     // in a row without a question that can be used

std::vector<std::string> instances(int count, Random random) {
  std::vector<std::string> scripts;
  for (int i = 0; i < count; ++i) scripts.push_back(instance_script(random.next()));
  return scripts;
}

// Draws the questions of some splits, by the number of tables, then of filters, then at random.
class Source {
 public:
  Source(const Grammar& grammar, std::initializer_list<Split> splits, Judge& reward,
         Judge& evaluation, Random random)
      : grammar_(grammar), judges_{&reward, &evaluation}, random_(random) {
    for (size_t i = 0; i < grammar.compositions().size(); ++i) {
      const Composition& composition = grammar.compositions()[i];
      if (std::find(splits.begin(), splits.end(), composition.split) == splits.end()) continue;
      candidates_[static_cast<size_t>(composition.tables - 1)][composition.filters.size()]
          .push_back(static_cast<int>(i));
    }
  }

  std::vector<Question> questions(int count, bool label, bool unique) {
    std::vector<Question> result;
    std::unordered_set<std::string> texts;
    while (static_cast<int>(result.size()) < count) {
      Question question = next(label);
      if (texts.insert(question.text).second || !unique) result.push_back(std::move(question));
    }
    return result;
  }

 private:
  Question next(bool label) {
    const ByFilters& by_filters = candidates_[weighted(kTableWeights)];
    for (int attempt = 0; attempt < kMostDraws; ++attempt) {
      const std::vector<int>& candidates = by_filters[weighted(kFilterWeights)];
      if (candidates.empty()) continue;
      const int index = candidates[random_.below(candidates.size())];
      const Composition& composition = grammar_.compositions()[static_cast<size_t>(index)];
      const auto [text, query] = grammar_.draw(composition, random_);
      if (!worth_asking(query.sql())) continue;
      return {.text = text,
              .gold_sql = query.sql(),
              .logged_sql = label ? logged(query, random_).sql() : "",
              .tables = composition.tables,
              .composition = index};
    }
    throw std::logic_error("Task: no question has an informative answer on these instances");
  }

  // An index with a probability in proportion to its weight.
  template <size_t N>
  size_t weighted(const std::array<double, N>& weights) {
    double left = std::accumulate(weights.begin(), weights.end(), 0.0);
    size_t index = 0;
    for (; index + 1 < N; left -= weights[index++]) {
      if (random_.chance(weights[index] / left)) break;
    }
    return index;
  }

  bool worth_asking(const std::string& sql) {
    return std::all_of(judges_.begin(), judges_.end(), [&sql](Judge* judge) {
      return judge->informative_instances(sql, kEnoughInstances) == kEnoughInstances;
    });
  }

  using ByFilters = std::array<std::vector<int>, kMostFilters + 1>;

  const Grammar& grammar_;
  std::array<Judge*, 2> judges_;
  Random random_;
  std::array<ByFilters, kMostTables> candidates_;
};

void check(std::string_view name, int value, int lowest) {
  if (value >= lowest) return;
  throw std::invalid_argument("Task: " + std::string(name) + " must be at least " +
                              std::to_string(lowest) + ", got " + std::to_string(value));
}

const TaskOptions& checked(const TaskOptions& options) {
  check("log_questions", options.log_questions, 0);
  check("practice_questions", options.practice_questions, 0);
  check("held_out_questions", options.held_out_questions, 0);
  check("reward_instances", options.reward_instances, kEnoughInstances);
  check("evaluation_instances", options.evaluation_instances, kEnoughInstances);
  return options;
}

// Independent streams: a different number of log questions leaves the others as they are.
Random stream(const TaskOptions& options, uint64_t index) {
  return Random(Random::mix(options.seed * 8 + index));
}

}  // namespace

Task::Task(const TaskOptions& options)
    : options_(checked(options)),
      grammar_(options.seed),
      reward_scripts_(instances(options.reward_instances, stream(options, 0))),
      evaluation_scripts_(instances(options.evaluation_instances, stream(options, 1))) {
  Judge reward(*this, Instances::reward);
  Judge evaluation(*this, Instances::evaluation);
  Source log(grammar_, {Split::log}, reward, evaluation, stream(options, 2));
  Source practice(grammar_, {Split::log, Split::reward}, reward, evaluation, stream(options, 3));
  Source held_out(grammar_, {Split::held_out}, reward, evaluation, stream(options, 4));
  log_ = log.questions(options.log_questions, true, false);
  practice_ = practice.questions(options.practice_questions, false, false);
  held_out_ = held_out.questions(options.held_out_questions, false, true);
}

double Task::log_accuracy() const {
  Judge judge(*this, Instances::evaluation);
  const auto right = std::count_if(log_.begin(), log_.end(), [&judge](const Question& question) {
    return question.logged_sql == question.gold_sql || judge.correct(question, question.logged_sql);
  });
  return static_cast<double>(right) / static_cast<double>(std::max<size_t>(log_.size(), 1));
}

const std::vector<std::string>& Task::instance_scripts(Instances which) const {
  return which == Instances::reward ? reward_scripts_ : evaluation_scripts_;
}

std::vector<std::string> Task::corpus() const {
  std::vector<std::string> texts;
  for (const Question& question : log_) {
    texts.push_back(question.text);
    texts.push_back(question.logged_sql);
  }
  for (const Question& question : practice_) texts.push_back(question.text);
  return texts;
}

}  // namespace text2sql
