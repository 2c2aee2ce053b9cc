#include <ATen/ATen.h>
#include <fcntl.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <signal.h>
#include <spawn.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <cmath>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <sstream>
#include <string>
#include <thread>

#include "examples/text2sql/checkpoint.h"
#include "examples/text2sql/rl_batch.h"
#include "examples/text2sql/sampler.h"
#include "rl/catalogue.h"

extern char** environ;

namespace text2sql {
namespace {

namespace fs = std::filesystem;

// ---- model and sampler ------------------------------------------------------------------------

constexpr TransformerOptions kSmall{.vocabulary = 40, .width = 32, .layers = 2, .heads = 2};

std::vector<Ids> prompts() { return {{1, 7, 8, 9, 2}, {1, 30, 2}, {1, 11, 12, 13, 14, 15, 16, 2}}; }

// Sharp enough that greedy answers differ between prompts.
std::shared_ptr<Transformer> random_model() {
  auto model = std::make_shared<Transformer>(kSmall, 3);
  const at::NoGradGuard no_grad;
  for (at::Tensor& parameter : model->parameters()) {
    if (parameter.dim() == 2) parameter.mul_(2);
  }
  return model;
}

at::Tensor row_of(const Ids& prompt, const Ids& completion) {
  Ids all = prompt;
  all.insert(all.end(), completion.begin(), completion.end());
  return pad_right({all});
}

TEST(Sampler, GreedyWithCacheIsTheArgmaxOfTheWholeRow) {
  const auto model = random_model();
  const at::NoGradGuard no_grad;
  const std::vector<Ids> answers = sample(*model, prompts(), {.max_tokens = 12, .greedy = true});
  for (size_t i = 0; i < answers.size(); ++i) {
    const Ids prompt = prompts()[i];
    const at::Tensor logits = model->logits(model->rows(row_of(prompt, answers[i])))[0];
    for (size_t t = 0; t < answers[i].size(); ++t) {
      const auto at_token = static_cast<int64_t>(prompt.size() + t) - 1;
      EXPECT_EQ(logits[at_token].argmax().item<int64_t>(), answers[i][t]) << i << ", " << t;
    }
  }
}

TEST(Sampler, DrawsWithTheModelsProbabilities) {
  const auto model = std::make_shared<Transformer>(kSmall, 5);
  const at::NoGradGuard no_grad;
  constexpr int64_t kDraws = 20000;
  const std::vector<Ids> draws =
      sample(*model, {prompts()[0]}, {.samples_per_prompt = kDraws, .max_tokens = 1, .seed = 1});
  at::Tensor counts = at::zeros({kSmall.vocabulary}, at::kDouble);
  for (const Ids& each : draws) counts[each.at(0)] += 1;
  const at::Tensor hidden = model->rows(pad_right({prompts()[0]}));
  const at::Tensor p = at::softmax(model->logits(hidden)[0][-1].to(at::kDouble), -1);
  const at::Tensor sigma = (p * (1 - p) / static_cast<double>(kDraws)).sqrt();
  const double worst = ((counts / kDraws - p).abs() / sigma).max().item<double>();
  EXPECT_LT(worst, 4.5);  // of 40 normal deviates: exceeded with probability 3e-4
}

// A completion has its own random stream, so neighbours that finish first change nothing.
TEST(Sampler, ACompletionDoesNotDependOnTheOthers) {
  const auto model = random_model();
  const SamplerOptions options{.samples_per_prompt = 4, .max_tokens = 30, .seed = 9};
  const std::vector<Ids> together = sample(*model, prompts(), options);
  const std::vector<Ids> alone = sample(*model, {prompts()[0]}, options);
  for (size_t i = 0; i < alone.size(); ++i) EXPECT_EQ(alone[i], together[i]);
}

// The shared-prompt path of RL and the whole-row path of SFT are the same function, and so are
// their gradients.
TEST(RlBatch, LogpsAndGradientsEqualThoseOfWholeRows) {
  const auto model = random_model();
  std::vector<Group> groups;
  const std::vector<Ids> completions =
      sample(*model, prompts(), {.samples_per_prompt = 2, .max_tokens = 9, .seed = 4});
  for (size_t i = 0; i < prompts().size(); ++i) {
    groups.push_back({prompts()[i],
                      {completions[2 * i], completions[2 * i + 1]},
                      at::tensor({1.0F, 0.0F}),
                      at::tensor({1.0F, -1.0F})});
  }
  const Minibatch minibatch = make_minibatch(groups, tether::presets::grpo(0));
  ASSERT_EQ(minibatch.parts.size(), 1U);
  completion_logps(*model, minibatch.parts[0]).logps.sum().backward();
  std::vector<at::Tensor> gradients;
  for (const at::Tensor& parameter : model->parameters()) {
    gradients.push_back(parameter.grad().defined() ? parameter.grad().clone() : at::Tensor());
  }
  model->zero_grad();

  double total = 0;
  for (size_t i = 0; i < completions.size(); ++i) {
    const Ids prompt = prompts()[i / 2];
    const at::Tensor row = row_of(prompt, completions[i]);
    const auto first = static_cast<int64_t>(prompt.size());
    const auto length = static_cast<int64_t>(completions[i].size());
    const at::Tensor hidden = model->rows(row).narrow(1, first - 1, length);
    const at::Tensor logps =
        tether::token_logps(model->logits(hidden), row.narrow(1, first, length)).logps;
    logps.sum().backward();
    total += logps.sum().item<double>();
  }
  EXPECT_NEAR(completion_logps(*model, minibatch.parts[0]).logps.sum().item<double>(), total,
              1e-4 * std::abs(total));
  for (size_t i = 0; i < gradients.size(); ++i) {
    const at::Tensor other = model->parameters()[i].grad();
    ASSERT_EQ(gradients[i].defined(), other.defined());
    if (!other.defined()) continue;  // the value head
    EXPECT_LT((gradients[i] - other).norm().item<double>(), 1e-4 * other.norm().item<double>());
  }
}

TEST(RlBatch, EqualRewardsAreCountedButNotComputed) {
  const Group learnable{
      {1, 5, 2}, {{6, 3}, {7, 8, 3}}, at::tensor({1.0F, 0.0F}), at::tensor({1.0F, -1.0F})};
  const Group solved{
      {1, 6, 2}, {{6, 3}, {9, 3}}, at::tensor({1.0F, 1.0F}), at::tensor({0.0F, 0.0F})};
  const Minibatch without = make_minibatch({learnable, solved}, tether::presets::grpo(0));
  ASSERT_EQ(without.parts.size(), 1U);
  EXPECT_EQ(without.parts[0].inputs.size(0), 2);
  EXPECT_EQ(without.counts.sequences, 4);
  EXPECT_EQ(without.counts.policy, 9);
  const Minibatch with_penalty = make_minibatch({learnable, solved}, tether::presets::grpo(0.1));
  ASSERT_EQ(with_penalty.parts.size(), 1U);
  EXPECT_EQ(with_penalty.parts[0].inputs.size(0), 4);
}

// ---- the program ------------------------------------------------------------------------------

class Program : public ::testing::Test {
 protected:
  void SetUp() override {
    folder_ = fs::temp_directory_path() /
              ("text2sql_test_" + std::to_string(::getpid()) + "_" +
               ::testing::UnitTest::GetInstance()->current_test_info()->name());
    fs::create_directories(folder_);
  }
  void TearDown() override { fs::remove_all(folder_); }

  pid_t start(std::vector<std::string> arguments) {
    arguments.insert(arguments.begin(), TEXT2SQL_PROGRAM);
    std::vector<char*> argv;
    for (std::string& argument : arguments) argv.push_back(argument.data());
    argv.push_back(nullptr);
    posix_spawn_file_actions_t files;
    posix_spawn_file_actions_init(&files);
    const std::string out = output_path(), error = error_path();
    constexpr int kNew = O_WRONLY | O_CREAT | O_TRUNC;
    posix_spawn_file_actions_addopen(&files, 1, out.c_str(), kNew, 0644);
    posix_spawn_file_actions_addopen(&files, 2, error.c_str(), kNew, 0644);
    pid_t child = 0;
    EXPECT_EQ(posix_spawn(&child, TEXT2SQL_PROGRAM, &files, nullptr, argv.data(), environ), 0);
    posix_spawn_file_actions_destroy(&files);
    return child;
  }

  static int finish(pid_t child) {
    int status = 0;
    ::waitpid(child, &status, 0);
    return WIFEXITED(status) ? WEXITSTATUS(status) : -WTERMSIG(status);
  }

  int run(const std::vector<std::string>& arguments) { return finish(start(arguments)); }

  static std::string read(const fs::path& path) {
    std::ifstream in(path, std::ios::binary);
    return {std::istreambuf_iterator<char>(in), {}};
  }

  std::string output_path() const { return folder_ / "stdout"; }
  std::string error_path() const { return folder_ / "stderr"; }
  std::string output() const { return read(output_path()); }
  std::string error() const { return read(error_path()); }

  fs::path folder_;
};

TEST_F(Program, ABadOptionGetsOneLineAndExitCode2) {
  std::string names;
  for (const auto& row : tether::kCatalogue) names += std::string(row.name) + ", ";
  for (const auto& row : tether::kPreferenceCatalogue) {
    if (!row.preset().loss.takes_labels()) names += std::string(row.name) + ", ";
  }
  std::string weights = "none";
  tether::for_each_weight([&](const auto& row) {
    if (row.name != "self_distillation") weights += ", " + std::string(row.name);
  });
  const std::vector<std::pair<std::vector<std::string>, std::string>> cases = {
      {{"--objective", "foo"}, "text2sql: --objective must be one of " + names + "got foo\n"},
      {{"--steps", "-3"}, "text2sql: --steps must be a whole number from 0 to 1000000, got -3\n"},
      {{"--sft-steps", "many"},
       "text2sql: --sft-steps must be a whole number from 0 to 1000000, got many\n"},
      {{"--beta", "nan"}, "text2sql: --beta must be a number from 0 to 100, got nan\n"},
      {{"--stale", "-1"}, "text2sql: --stale must be a whole number from 0 to 1000000, got -1\n"},
      {{"--weight", "tis"}, "text2sql: --weight must be one of " + weights + ", got tis\n"},
      {{"--objective", "dpo", "--weight", "opsm"},
       "text2sql: --weight must be none with --objective dpo, got opsm\n"},
      {{"--threads", "0"}, "text2sql: --threads must be a whole number from 1 to 256, got 0\n"},
      {{"--save", "/dev/null/runs"},
       "text2sql: --save must be a folder that can be written, got /dev/null/runs\n"},
      {{"--sedd", "1"}, "text2sql: The following arguments were not expected: 1 --sedd\n"},
  };
  for (const auto& [arguments, message] : cases) {
    EXPECT_EQ(run(arguments), 2) << message;
    EXPECT_EQ(error(), message);
  }
}

TEST_F(Program, HelpNamesTheOptions) {
  EXPECT_EQ(run({"--help"}), 0);
  EXPECT_THAT(output(), ::testing::HasSubstr("--objective"));
  EXPECT_THAT(output(), ::testing::HasSubstr("--resume"));
}

// Long enough that some groups of samples have unequal rewards, which move the weights.
std::vector<std::string> tiny_run(const fs::path& folder) {
  std::istringstream options(
      "--sft-steps 100 --steps 6 --prompts 16 --stale 2 --weight opsm --no-control --evaluations 1 "
      "--threads 1 --checkpoint-every 4 --save");
  std::vector<std::string> out{std::istream_iterator<std::string>(options), {}};
  out.push_back(folder);
  return out;
}

std::vector<std::string> resumed(const fs::path& folder) {
  return {"--save", folder, "--resume", "--threads", "1", "--checkpoint-every", "4"};
}

std::vector<at::Tensor> final_parameters(const fs::path& folder,
                                         const std::string& model_name = "after_rl") {
  Checkpoint checkpoint(folder / "checkpoint");
  EXPECT_EQ(checkpoint.state().phase, Phase::done);
  Transformer model({.vocabulary = checkpoint.tokenizer().size()}, 0);
  checkpoint.restore({{model_name, &model}});
  return model.parameters();
}

TEST_F(Program, KilledAtAnyMomentItGoesOnToTheSameBits) {
  const fs::path whole = folder_ / "whole", killed = folder_ / "killed";
  const auto start_time = std::chrono::steady_clock::now();
  ASSERT_EQ(run(tiny_run(whole)), 0) << error();
  const auto duration = std::chrono::steady_clock::now() - start_time;

  int kills = 0;
  for (int i = 1; i <= 5; ++i) {
    const bool saved = fs::exists(killed / "checkpoint");
    const pid_t child = start(saved ? resumed(killed) : tiny_run(killed));
    std::this_thread::sleep_for(duration * (11 + 13 * i) / 100);
    ::kill(child, SIGKILL);
    kills += finish(child) == -SIGKILL ? 1 : 0;
  }
  EXPECT_GE(kills, 1);
  ASSERT_TRUE(fs::exists(killed / "checkpoint"));
  ASSERT_EQ(run(resumed(killed)), 0) << error();

  const auto expected = final_parameters(whole), actual = final_parameters(killed);
  EXPECT_FALSE(at::equal(expected[0], final_parameters(whole, "after_sft")[0]));
  for (size_t i = 0; i < expected.size(); ++i) EXPECT_TRUE(at::equal(expected[i], actual[i])) << i;
}

TEST_F(Program, CtrlCWritesACheckpointAndADamagedOneGetsOneLine) {
  const fs::path saved = folder_ / "run";
  std::vector<std::string> arguments = tiny_run(saved);
  arguments[1] = "100000";
  const pid_t child = start(arguments);
  while (!fs::exists(saved / "checkpoint")) {
    std::this_thread::sleep_for(std::chrono::milliseconds(20));
  }
  ::kill(child, SIGINT);
  EXPECT_EQ(finish(child), 130) << error();
  EXPECT_THAT(output(), ::testing::EndsWith("--resume\n"));

  const std::string checkpoint = (saved / "checkpoint").string();
  EXPECT_EQ(run({"--save", saved.string(), "--resume", "--seed", "3"}), 2);
  EXPECT_EQ(error(), "text2sql: --seed must be 0 as in the checkpoint, got 3\n");

  const std::string bytes = read(checkpoint);
  std::ofstream(checkpoint, std::ios::binary) << bytes.substr(0, bytes.size() / 2);
  EXPECT_EQ(run(resumed(saved)), 2);
  EXPECT_EQ(error(), "text2sql: " + checkpoint + ": the checkpoint is cut short\n");

  std::string damaged = bytes;
  damaged[damaged.size() / 2] ^= 1;
  std::ofstream(checkpoint, std::ios::binary) << damaged;
  EXPECT_EQ(run(resumed(saved)), 2);
  EXPECT_EQ(error(), "text2sql: " + checkpoint + ": the checkpoint is damaged\n");

  fs::remove(checkpoint);
  EXPECT_EQ(run(resumed(saved)), 2);
  EXPECT_EQ(error(),
            "text2sql: " + checkpoint + ": no checkpoint there (No such file or directory)\n");
}

// ---- it learns --------------------------------------------------------------------------------

double held_out_after(const RunState& state, Phase phase) {
  double last = -1;
  for (const CurvePoint& point : state.curve) {
    if (point.phase == phase && !std::isnan(point.held_out)) last = point.held_out;
  }
  return last;
}

TEST_F(Program, AShortRunGains15PointsOnHeldOutQuestions) {
  const fs::path saved = folder_ / "quick";
  ASSERT_EQ(run({"--quick", "--save", saved.string()}), 0) << error();
  const RunState state = Checkpoint(saved / "checkpoint").state();
  const double before = held_out_after(state, Phase::sft);
  const double after = held_out_after(state, Phase::rl);
  EXPECT_GE(after - before, 0.15) << before << " -> " << after;
  EXPECT_THAT(output(), ::testing::HasSubstr("Audit: "));
}

}  // namespace
}  // namespace text2sql
