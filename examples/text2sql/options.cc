#include "examples/text2sql/options.h"

#include <CLI/CLI.hpp>
#include <charconv>
#include <iostream>
#include <limits>
#include <sstream>
#include <stdexcept>

#include "examples/text2sql/objectives.h"

namespace text2sql {
namespace {

template <class T>
std::string shown(const T& value) {
  std::ostringstream out;
  out << value;
  return out.str();
}

// CLI11 calls these before it converts the text, and reports "NAME: " and what they return.
CLI::Validator whole_number(int64_t lowest, int64_t highest) {
  return CLI::Validator(
      [=](const std::string& text) -> std::string {
        int64_t value = 0;
        const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
        const bool ok = error == std::errc() && end == text.data() + text.size() &&
                        value >= lowest && value <= highest;
        if (ok) return "";
        return "must be a whole number from " + shown(lowest) + " to " + shown(highest) + ", got " +
               text;
      },
      "", "whole number");
}

CLI::Validator number(double lowest, double highest) {
  return CLI::Validator(
      [=](const std::string& text) -> std::string {
        double value = 0;
        const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
        const bool ok = error == std::errc() && end == text.data() + text.size() &&
                        value >= lowest && value <= highest;
        if (ok) return "";
        return "must be a number from " + shown(lowest) + " to " + shown(highest) + ", got " + text;
      },
      "", "number");
}

CLI::Validator one_of(const std::vector<std::string>& names) {
  return CLI::Validator(
      [=](const std::string& text) -> std::string {
        std::string known;
        for (const std::string& name : names) {
          if (text == name) return "";
          known += (known.empty() ? "" : ", ") + name;
        }
        return "must be one of " + known + ", got " + text;
      },
      "", "name");
}

// "--steps: must be .." -> "--steps must be .."
std::string one_line(std::string message) {
  if (const size_t at = message.find(": must"); at != std::string::npos) message.erase(at, 1);
  return message.substr(0, message.find('\n'));
}

struct Flags {
  bool quick = false;
  bool no_control = false;
  std::string folder;
};

void declare(CLI::App& app, Options& options, Flags& flags) {
  constexpr int64_t kMany = 1000000;
  app.set_help_flag("-h,--help", "Print this help and exit");
  app.add_option("--objective", options.objective,
                 "Any of the library's: grpo, rloo, dapo, gspo, dpo, ...")
      ->check(one_of(objective_names()))
      ->capture_default_str();
  app.add_option("--seed", options.seed, "Of the data, the weights and the samples")
      ->check(whole_number(0, std::numeric_limits<int64_t>::max()))
      ->capture_default_str();
  app.add_option("--steps", options.steps, "Steps of reinforcement learning")
      ->check(whole_number(0, kMany))
      ->capture_default_str();
  app.add_option("--sft-steps", options.sft_steps, "Steps of supervised fine-tuning before them")
      ->check(whole_number(0, kMany))
      ->capture_default_str();
  app.add_option("--prompts", options.prompts, "Questions per step of reinforcement learning")
      ->check(whole_number(1, 4000))
      ->capture_default_str();
  app.add_option("--samples", options.samples, "Answers sampled per question")
      ->check(whole_number(1, 256))
      ->capture_default_str();
  app.add_option("--beta", options.beta,
                 "Weight of the KL penalty to the model after SFT; of dpo, its beta")
      ->check(number(0, 100))
      ->capture_default_str();
  app.add_option("--stale", options.stale,
                 "The sampler's weights are up to so many steps old, as in asynchronous training")
      ->check(whole_number(0, kMany))
      ->capture_default_str();
  app.add_option("--weight", options.weight,
                 "Any of the library's weights of tokens, for a policy objective: "
                 "truncated_importance, ...")
      ->check(one_of(weight_names()))
      ->capture_default_str();
  app.add_option("--evaluations", options.evaluations,
                 "Held-out accuracies per phase, that of its end included")
      ->check(whole_number(1, kMany))
      ->capture_default_str();
  app.add_option("--threads", options.threads, "Threads; more than idle cores is slow")
      ->check(whole_number(1, 256))
      ->capture_default_str();
  app.add_option("--save", flags.folder,
                 "Folder for checkpoint, curve.csv and curve.png; by default "
                 "runs/OBJECTIVE[-WEIGHT][-staleSTALE]-seedSEED");
  app.add_option("--checkpoint-every", options.checkpoint_every, "Steps between checkpoints")
      ->check(whole_number(1, kMany))
      ->capture_default_str();
  app.add_flag("--resume", options.resume, "Go on from the folder's checkpoint");
  app.add_flag("--quick", flags.quick, "A short run: --sft-steps 600 --steps 25 --no-control");
  app.add_flag("--no-control", flags.no_control, "Without \"the same time, more SFT\"");
}

std::string run_name(const Options& options) {
  std::string out = options.objective;
  if (options.weight != "none") out += "-" + options.weight;
  if (options.stale > 0) out += "-stale" + shown(options.stale);
  return out + "-seed" + shown(options.seed);
}

void apply(const CLI::App& app, const Flags& flags, Options& options) {
  for (const CLI::Option* option : app.get_options()) {
    if (option->count() > 0) options.given.insert(option->get_name());
  }
  if (flags.quick) {
    if (!options.given.contains("--sft-steps")) options.sft_steps = 600;
    if (!options.given.contains("--steps")) options.steps = 25;
    options.given.insert({"--sft-steps", "--steps", "--control"});
  }
  if (flags.no_control) options.given.insert("--control");
  options.control = !flags.quick && !flags.no_control;
  options.folder = flags.folder.empty() ? "runs/" + run_name(options) : flags.folder;
}

void check_weight(const Options& options) {
  if (options.weight == "none" || !objective_of(options.objective).preference) return;
  throw CLI::ValidationError(
      "--weight", "must be none with --objective " + options.objective + ", got " + options.weight);
}

}  // namespace

std::variant<Options, int> parse_options(int argc, const char* const* argv) {
  Options options;
  Flags flags;
  CLI::App app(
      "Teaches a small transformer SQL: supervised fine-tuning on a sloppy query log, then\n"
      "reinforcement learning with the reward of running the queries.",
      "text2sql");
  declare(app, options, flags);
  try {
    app.parse(argc, argv);
    check_weight(options);
  } catch (const CLI::CallForHelp&) {
    std::cout << app.help();
    return 0;
  } catch (const CLI::ParseError& error) {
    std::cerr << "text2sql: " << one_line(error.what()) << '\n';
    return 2;
  }
  apply(app, flags, options);
  return options;
}

Options resumed_options(const Options& command_line, const Options& checkpoint) {
  Options result = command_line;
  for_each_result_option(result, checkpoint, [&](const char* name, auto& mine, const auto& saved) {
    if (command_line.given.contains(name) && mine != saved) {
      throw std::invalid_argument(std::string(name) + " must be " + shown(saved) +
                                  " as in the checkpoint, got " + shown(mine));
    }
    mine = saved;
  });
  return result;
}

}  // namespace text2sql
