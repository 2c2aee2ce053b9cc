#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <vector>

#include "examples/text2sql/options.h"

namespace text2sql {

enum class Phase : int64_t { sft, rl, control, done };

// Share of right answers, over all questions and by the number of tables that they need.
struct Accuracy {
  std::array<int64_t, 4> asked{};  // [0]: all, [1] .. [3]: by tables
  std::array<int64_t, 4> right{};

  void add(int tables, bool correct);
  double share(size_t tables) const;
  double standard_error(size_t tables) const;  // of a binomial share
};

// One row of curve.csv. NaN = not measured at this step.
struct CurvePoint {
  static constexpr double kNone = __builtin_nan("");

  Phase phase = Phase::sft;
  int64_t step = 0;     // steps done in this phase
  double seconds = 0;   // processor time spent on training in this phase
  double loss = kNone;  // SFT and control: mean since the row before
  double reward = kNone;
  double kl_old = kNone;        // KL of the sampling policy to the updated one, nats per token
  double kl_reference = kNone;  // KL to the model after SFT, where there is a penalty
  double clip_fraction = kNone;
  double entropy = kNone;
  double gradient_norm = kNone;
  double held_out = kNone;  // accuracy of greedy answers

  // visit(name, number) for every number
  template <class Self, class Visit>
  static void for_each(Self& point, Visit visit) {
    visit("seconds", point.seconds);
    visit("loss", point.loss);
    visit("reward", point.reward);
    visit("kl_old", point.kl_old);
    visit("kl_reference", point.kl_reference);
    visit("clip_fraction", point.clip_fraction);
    visit("entropy", point.entropy);
    visit("gradient_norm", point.gradient_norm);
    visit("held_out", point.held_out);
  }
};

// Where a run is; with the weights, the optimizer and the tokenizer it makes a checkpoint.
struct RunState {
  Options options;
  Phase phase = Phase::sft;
  int64_t step = 0;           // next step of the phase
  int64_t control_steps = 0;  // as many as take the time of RL; known when RL is done
  double log_accuracy = 0;    // share of right labels in the query log
  int64_t audited = 0;        // rewarded samples of the last steps of RL, and
  int64_t accidental = 0;     // those of them that the evaluation instances reject
  std::vector<CurvePoint> curve;
};

}  // namespace text2sql
