#pragma once

#include <chrono>
#include <cstdint>
#include <string>
#include <vector>

#include "examples/text2sql/grader.h"
#include "examples/text2sql/run_state.h"

namespace text2sql {

// One line that tells how a phase goes: rewritten in place on a terminal; elsewhere, in a log file
// say, about ten plain lines per phase.
class ProgressLine {
 public:
  ProgressLine(std::string title, int64_t done, int64_t total);
  void update(int64_t done, const std::string& figures);
  void end();

 private:
  std::string title_;
  int64_t first_, total_;
  bool terminal_;
  std::chrono::steady_clock::time_point start_;
};

std::string fixed(double value, int decimals);       // "0.50"
std::string percent(double share);                   // "50.0 %"
std::string title_of(const std::string& objective);  // "GRPO"
std::string curve_csv(const std::vector<CurvePoint>& curve);

struct Summary {
  const RunState& state;
  std::vector<Answer> after_sft, after_rl, control;  // of the held-out questions; no control: empty
};

// What the run has shown, for people.
std::string summary_text(const Summary& summary);

}  // namespace text2sql
