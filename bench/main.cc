#include <ATen/Parallel.h>
#include <benchmark/benchmark.h>
#include <malloc.h>
#include <torch/version.h>

#include <fstream>
#include <memory>
#include <string>
#include <vector>

#include "bench/stream.h"

namespace tether::bench {

void register_estimators();
void register_logits();
#ifdef TETHER_BENCH_TEXT2SQL
void register_text2sql();
#endif
void register_token_losses();

namespace {

// Bandwidth from memory: 1 GiB is beyond every cache.
constexpr int64_t kWords = (int64_t{1} << 30) / 8;

const std::vector<uint64_t>& gibibyte() {
  static const std::vector<uint64_t> words(kWords, 1);
  return words;
}

void machine_read(benchmark::State& state) {
  const std::vector<uint64_t>& words = gibibyte();
  for (auto _ : state) benchmark::DoNotOptimize(read(words.data(), kWords));
  state.SetBytesProcessed(state.iterations() * kWords * 8);
}

void machine_copy(benchmark::State& state) {
  const std::vector<uint64_t>& words = gibibyte();
  std::vector<uint64_t> to(kWords);
  for (auto _ : state) {
    copy(words.data(), to.data(), kWords);
    benchmark::ClobberMemory();
  }
  state.SetBytesProcessed(state.iterations() * kWords * 16);
}

std::string cpu_model() {
  std::ifstream info("/proc/cpuinfo");
  for (std::string line; std::getline(info, line);) {
    if (line.rfind("model name", 0) == 0) return line.substr(line.find(':') + 2);
  }
  return "unknown";
}

std::string instruction_set() {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("x86-64-v4")) return "x86-64-v4";
  if (__builtin_cpu_supports("x86-64-v3")) return "x86-64-v3";
#endif
  return "default";
}

void add_context() {
  benchmark::AddCustomContext("torch", TORCH_VERSION);
  benchmark::AddCustomContext("threads", std::to_string(at::get_num_threads()));
  benchmark::AddCustomContext("instruction_set", instruction_set());
  benchmark::AddCustomContext("compiler", "g++ " __VERSION__);
  benchmark::AddCustomContext("cpu", cpu_model());
}

}  // namespace
}  // namespace tether::bench

// Medians of interleaved repetitions, unless the command line says otherwise.
int main(int argc, char** argv) {
  std::vector<std::string> options{argv[0], "--benchmark_enable_random_interleaving=true",
                                   "--benchmark_repetitions=9", "--benchmark_min_time=0.05",
                                   "--benchmark_display_aggregates_only=true"};
  options.insert(options.end(), argv + 1, argv + argc);
  std::vector<char*> pointers;
  for (std::string& option : options) pointers.push_back(option.data());
  int count = int(pointers.size());
  benchmark::Initialize(&count, pointers.data());
  if (benchmark::ReportUnrecognizedArguments(count, pointers.data())) return 1;

  // Memory once used is kept: what a fresh page costs is the machine's affair, and would hide the
  // arithmetic of whoever allocates.
  mallopt(M_MMAP_THRESHOLD, 1 << 30);
  mallopt(M_TRIM_THRESHOLD, -1);
  at::set_num_threads(1);
  tether::bench::add_context();
  benchmark::RegisterBenchmark("machine/read", tether::bench::machine_read);
  benchmark::RegisterBenchmark("machine/copy", tether::bench::machine_copy);
  tether::bench::register_token_losses();
  tether::bench::register_estimators();
  tether::bench::register_logits();
#ifdef TETHER_BENCH_TEXT2SQL
  tether::bench::register_text2sql();
#endif
  benchmark::RunSpecifiedBenchmarks();
  return 0;
}
