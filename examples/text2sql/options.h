#pragma once

#include <cstdint>
#include <filesystem>
#include <set>
#include <string>
#include <variant>

namespace text2sql {

struct Options {
  std::string objective = "grpo";
  uint64_t seed = 0;
  int64_t steps = 100;
  int64_t sft_steps = 1000;
  int64_t prompts = 32;
  int64_t samples = 8;
  double beta = 0;
  int64_t stale = 0;
  std::string weight = "none";
  bool control = true;
  int64_t evaluations = 5;

  int threads = 2;
  int64_t checkpoint_every = 25;
  bool resume = false;
  std::filesystem::path folder;

  std::set<std::string> given;  // names of the options on the command line
};

// visit(name, a, b) for every option that changes the result, here and in `other`.
template <class A, class B, class Visit>
void for_each_result_option(A& options, B& other, Visit visit) {
  visit("--objective", options.objective, other.objective);
  visit("--seed", options.seed, other.seed);
  visit("--steps", options.steps, other.steps);
  visit("--sft-steps", options.sft_steps, other.sft_steps);
  visit("--prompts", options.prompts, other.prompts);
  visit("--samples", options.samples, other.samples);
  visit("--beta", options.beta, other.beta);
  visit("--stale", options.stale, other.stale);
  visit("--weight", options.weight, other.weight);
  visit("--control", options.control, other.control);
  visit("--evaluations", options.evaluations, other.evaluations);
}

// The options, or the exit code of a program that has nothing more to do: 0 after --help, 2 after a
// bad option, which has got its line on stderr.
std::variant<Options, int> parse_options(int argc, const char* const* argv);

// The options of a run that goes on: those of its checkpoint, which options on the command line may
// repeat but not change. Throws std::invalid_argument.
Options resumed_options(const Options& command_line, const Options& checkpoint);

}  // namespace text2sql
