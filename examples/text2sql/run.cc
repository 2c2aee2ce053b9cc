#include "examples/text2sql/run.h"

#include <ATen/Parallel.h>
#include <sys/resource.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <csignal>
#include <cstdio>
#include <functional>
#include <memory>
#include <optional>
#include <stdexcept>

#include "examples/text2sql/checkpoint.h"
#include "examples/text2sql/evaluation.h"
#include "examples/text2sql/random.h"
#include "examples/text2sql/report.h"
#include "examples/text2sql/rl.h"
#include "examples/text2sql/sft.h"

namespace text2sql {
namespace {

constexpr int kInterrupted = 130;
constexpr int64_t kAuditedSteps = 10;  // the last steps of RL

volatile std::sig_atomic_t stop_requested = 0;

// A second Ctrl-C ends the program at once.
void stop_cleanly_on_signals() {
  struct sigaction action{};
  action.sa_handler = [](int) { stop_requested = 1; };
  action.sa_flags = static_cast<int>(SA_RESETHAND);
  ::sigaction(SIGINT, &action, nullptr);
  ::sigaction(SIGTERM, &action, nullptr);
}

double processor_seconds() {
  rusage usage{};
  ::getrusage(RUSAGE_SELF, &usage);
  const auto seconds = [](const timeval& t) {
    return static_cast<double>(t.tv_sec) + 1e-6 * static_cast<double>(t.tv_usec);
  };
  return seconds(usage.ru_utime) + seconds(usage.ru_stime);
}

double mean(const tether::PolicyMetrics& metrics, tether::PolicyMetrics::Sum which) {
  const size_t at = 2 * static_cast<size_t>(which);
  return metrics.sums[at + 1] > 0 ? metrics.sums[at] / metrics.sums[at + 1] : 0;
}

void prepare_folder(const std::filesystem::path& folder) {
  try {
    std::filesystem::create_directories(folder);
    write_atomically(folder / ".writable", "");
    std::filesystem::remove(folder / ".writable");
  } catch (const std::exception&) {
    throw std::runtime_error("--save must be a folder that can be written, got " + folder.string());
  }
}

class Run {
 public:
  Run(const Options& options, std::optional<Checkpoint> checkpoint);
  int execute();

 private:
  struct StepResult {
    CurvePoint point;
    std::string figures;
  };
  using Step = std::function<StepResult(int64_t)>;

  bool supervised_phase(const char* title, int64_t steps);
  bool rl_phase();
  bool phase(const char* title, int64_t steps, torch::optim::AdamW& optimizer, const Step& step);
  void next_phase(Phase phase);
  void save(const torch::optim::Optimizer* optimizer) const;
  StepResult rl_result(const RlStep& step, double seconds) const;
  void audit(const RlStep& step);
  std::vector<Answer> held_out(Transformer& model) {
    return greedy_answers(model, task_.held_out(), tokenizer_, evaluation_);
  }
  double seconds_of(Phase phase) const;
  std::vector<NamedModel> models() const {
    return {{"model", model_.get()},
            {"sampler", sampler_.get()},
            {"after_sft", after_sft_.get()},
            {"after_rl", after_rl_.get()}};
  }
  std::filesystem::path checkpoint_path() const { return state_.options.folder / "checkpoint"; }
  SftOptions sft_options(int64_t steps) const;
  RlOptions rl_options() const;
  void report();

  std::optional<Checkpoint> checkpoint_;  // until its optimizer has been restored
  RunState state_;
  Task task_;
  Tokenizer tokenizer_;
  Grader reward_;
  Grader evaluation_;
  std::vector<Example> examples_;
  std::shared_ptr<Transformer> model_, sampler_, after_sft_, after_rl_;
};

RunState initial_state(const Options& options, const std::optional<Checkpoint>& checkpoint) {
  RunState state;
  if (checkpoint) state = checkpoint->state();
  state.options = checkpoint ? resumed_options(options, state.options) : options;
  return state;
}

Run::Run(const Options& options, std::optional<Checkpoint> checkpoint)
    : checkpoint_(std::move(checkpoint)),
      state_(initial_state(options, checkpoint_)),
      task_({.seed = state_.options.seed}),
      tokenizer_(checkpoint_ ? checkpoint_->tokenizer() : Tokenizer::train(task_.corpus())),
      reward_(task_, Instances::reward),
      evaluation_(task_, Instances::evaluation),
      examples_(logged_examples(task_.log(), tokenizer_)) {
  const TransformerOptions shape{.vocabulary = tokenizer_.size()};
  model_ = std::make_shared<Transformer>(shape, state_.options.seed);
  sampler_ = frozen_copy(*model_);
  after_sft_ = frozen_copy(*model_);
  after_rl_ = frozen_copy(*model_);
  if (checkpoint_) {
    checkpoint_->restore(models());
  } else {
    std::vector<const Question*> questions;
    std::vector<std::string> labels;
    for (const Question& question : task_.log()) {
      questions.push_back(&question);
      labels.push_back(question.logged_sql);
    }
    const std::vector<char> right = evaluation_.correct(questions, labels);
    const auto count = static_cast<double>(std::count(right.begin(), right.end(), 1));
    state_.log_accuracy = count / static_cast<double>(right.size());
  }
  std::printf("Query log: %zu questions, %s of the labels are right. Model: %lld parameters.\n",
              task_.log().size(), percent(state_.log_accuracy).c_str(),
              static_cast<long long>(model_->parameter_count()));
  std::fflush(stdout);
}

int Run::execute() {
  const Options& options = state_.options;
  const auto run_from = [&](Phase phase) { return state_.phase == phase; };
  bool going = true;
  if (run_from(Phase::sft)) {
    going = supervised_phase("SFT", options.sft_steps);
    if (going) {
      copy_parameters(*model_, *after_sft_);
      next_phase(Phase::rl);
    }
  }
  if (going && run_from(Phase::rl)) {
    going = rl_phase();
    if (going) {
      copy_parameters(*model_, *after_rl_);
      copy_parameters(*after_sft_, *model_);
      const double per_step = seconds_of(Phase::sft) / std::max<double>(1, options.sft_steps);
      state_.control_steps = static_cast<int64_t>(seconds_of(Phase::rl) / std::max(per_step, 1e-9));
      const bool control = options.control && options.sft_steps > 0 && options.steps > 0;
      next_phase(control ? Phase::control : Phase::done);
    }
  }
  if (going && run_from(Phase::control)) {
    going = supervised_phase("More SFT", state_.control_steps);
    if (going) next_phase(Phase::done);
  }
  if (!going) {
    std::printf("Stopped; go on with --save %s --resume\n", options.folder.c_str());
    return kInterrupted;
  }
  report();
  return 0;
}

// The control goes on from the weights after SFT with a fresh optimizer, as RL does.
bool Run::supervised_phase(const char* title, int64_t steps) {
  SftTrainer trainer(*model_, examples_, sft_options(steps));
  return phase(title, steps, trainer.optimizer(), [&](int64_t step) {
    const double loss = trainer.step(step);
    return StepResult{{.loss = loss}, "loss " + fixed(loss, 3)};
  });
}

bool Run::rl_phase() {
  RlTrainer trainer(*model_, *sampler_, *after_sft_, tokenizer_, task_.practice(), reward_,
                    rl_options());
  return phase(title_of(state_.options.objective).c_str(), state_.options.steps,
               trainer.optimizer(), [&](int64_t step) {
                 const auto start = std::chrono::steady_clock::now();
                 const RlStep result = trainer.step(step);
                 const std::chrono::duration<double> seconds =
                     std::chrono::steady_clock::now() - start;
                 if (step >= state_.options.steps - kAuditedSteps) audit(result);
                 return rl_result(result, seconds.count());
               });
}

// False: stopped by a signal, with a checkpoint.
bool Run::phase(const char* title, int64_t steps, torch::optim::AdamW& optimizer,
                const Step& step) {
  if (checkpoint_) checkpoint_->restore(optimizer);
  checkpoint_.reset();
  const int64_t evaluate_every = std::max<int64_t>(1, steps / state_.options.evaluations);
  double seconds = seconds_of(state_.phase);
  ProgressLine progress(title, state_.step, steps);
  while (state_.step < steps) {
    const double start = processor_seconds();
    StepResult result = step(state_.step);
    seconds += processor_seconds() - start;
    ++state_.step;
    result.point.phase = state_.phase;
    result.point.step = state_.step;
    result.point.seconds = seconds;
    const bool last = state_.step == steps;
    const bool near_end = !last && steps - state_.step < evaluate_every;
    if (last || (state_.step % evaluate_every == 0 && !near_end)) {
      result.point.held_out = accuracy_of(held_out(*model_)).share(0);
    }
    state_.curve.push_back(result.point);
    progress.update(state_.step, result.figures);
    const bool stop = stop_requested != 0;
    if (stop || state_.step % state_.options.checkpoint_every == 0) save(&optimizer);
    if (stop) {
      progress.end();
      return false;
    }
  }
  if (steps > 0) progress.end();
  return true;
}

void Run::next_phase(Phase phase) {
  if (!state_.curve.empty() && !std::isnan(state_.curve.back().held_out)) {
    std::printf("  held-out accuracy %s\n", percent(state_.curve.back().held_out).c_str());
  }
  state_.phase = phase;
  state_.step = 0;
  save(nullptr);
}

void Run::save(const torch::optim::Optimizer* optimizer) const {
  save_checkpoint(checkpoint_path(), state_, tokenizer_, models(), optimizer);
  write_atomically(state_.options.folder / "curve.csv", curve_csv(state_.curve));
}

Run::StepResult Run::rl_result(const RlStep& step, double seconds) const {
  using tether::PolicyMetrics;
  StepResult result;
  result.point.reward = step.reward();
  result.point.entropy = step.entropy;
  result.point.gradient_norm = step.gradient_norm;
  result.figures = "reward " + fixed(result.point.reward, 2);
  if (step.preference.sums[1] > 0) {
    const auto metrics = step.preference.to_map();
    result.figures += "  margin " + fixed(metrics.at("margin"), 3) + "  pairs right " +
                      percent(metrics.at("accuracy"));
  } else {
    result.point.kl_old = mean(step.metrics, PolicyMetrics::kApproxKlK3);
    result.point.clip_fraction = mean(step.metrics, PolicyMetrics::kClipFractionLow) +
                                 mean(step.metrics, PolicyMetrics::kClipFractionHigh);
    result.figures += "  KL " + fixed(result.point.kl_old, 5);
    if (state_.options.beta > 0) {
      result.point.kl_reference = mean(step.metrics, PolicyMetrics::kKl);
      result.figures += "  KL to SFT " + fixed(result.point.kl_reference, 4);
    }
    result.figures += "  clipped " + percent(result.point.clip_fraction);
  }
  if (step.values.sums[tether::ValueMetrics::kTokens] > 0) {
    result.figures +=
        "  explained variance " + fixed(step.values.to_map().at("explained_variance"), 2);
  }
  result.figures += "  entropy " + fixed(step.entropy, 3) + "  " +
                    fixed(static_cast<double>(step.answers.size()) / seconds, 0) + " samples/s";
  return result;
}

void Run::audit(const RlStep& step) {
  std::vector<const Question*> questions;
  std::vector<std::string> sqls;
  for (const Answer& answer : step.answers) {
    if (!answer.correct) continue;
    questions.push_back(answer.question);
    sqls.push_back(answer.sql);
  }
  const std::vector<char> verdicts = evaluation_.correct(questions, sqls);
  state_.audited += static_cast<int64_t>(verdicts.size());
  state_.accidental += std::count(verdicts.begin(), verdicts.end(), 0);
}

double Run::seconds_of(Phase phase) const {
  double seconds = 0;
  for (const CurvePoint& point : state_.curve) {
    if (point.phase == phase) seconds = point.seconds;
  }
  return seconds;
}

SftOptions Run::sft_options(int64_t steps) const {
  const uint64_t seed = Random::mix(state_.options.seed) + static_cast<uint64_t>(state_.phase);
  return {.steps = steps, .seed = seed};
}

RlOptions Run::rl_options() const {
  const Options& options = state_.options;
  RlOptions out;
  out.objective = objective_of(options.objective, options.weight, options.beta, out.max_tokens);
  out.steps = options.steps;
  out.prompts = options.prompts;
  out.samples = options.samples;
  out.stale = options.stale;
  out.seed = options.seed;
  return out;
}

void Run::report() {
  const Summary summary{.state = state_,
                        .after_sft = held_out(*after_sft_),
                        .after_rl = held_out(*after_rl_),
                        .control = state_.options.control && state_.control_steps > 0
                                       ? held_out(*model_)
                                       : std::vector<Answer>{}};
  const std::string text = summary_text(summary);
  write_atomically(state_.options.folder / "summary.txt", text);
  std::printf("%s\nFiles: %s (checkpoint, curve.csv, summary.txt)\n", text.c_str(),
              state_.options.folder.c_str());
}

}  // namespace

int run(const Options& options) {
  at::set_num_threads(options.threads);
  std::optional<Checkpoint> checkpoint;
  if (options.resume) {
    checkpoint.emplace(options.folder / "checkpoint");
  } else {
    prepare_folder(options.folder);
  }
  stop_cleanly_on_signals();
  return Run(options, std::move(checkpoint)).execute();
}

}  // namespace text2sql
