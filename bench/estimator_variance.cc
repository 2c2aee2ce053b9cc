// The one-sample KL estimators, measured beside what they are exactly: Schulman's table with
// confidence intervals. Prints it, and writes JSON for bench/plot_estimator_variance.py.

#include "bench/estimator_variance.h"

#include <CLI/CLI.hpp>
#include <cstdio>
#include <fstream>
#include <iostream>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>

namespace tether::bench {
namespace {

constexpr double kSigmas = 1.96;  // of a 95 % interval

// What Schulman printed, for shifts of 0.1 and 1.
std::optional<Accuracy> published(double shift, size_t estimator) {
  constexpr Accuracy kNear[] = {{0, 20}, {0.002, 1.42}, {0, 1.42}};
  constexpr Accuracy kFar[] = {{0, 2}, {0.25, 1.73}, {0, 1.7}};
  if (estimator > 2 || (shift != 0.1 && shift != 1)) return std::nullopt;
  return shift == 1 ? kFar[estimator] : kNear[estimator];
}

bool inside(double value, double measured, double error) {
  return std::abs(value - measured) <= kSigmas * error;
}

nlohmann::json row_of(double shift, size_t i, const Measured& measured, const Accuracy& truth) {
  nlohmann::json row{{"shift", shift},
                     {"estimator", kEstimators[i]},
                     {"bias", measured.value.bias},
                     {"bias_interval", kSigmas * measured.error.bias},
                     {"exact_bias", truth.bias},
                     {"std", measured.value.std},
                     {"std_interval", kSigmas * measured.error.std},
                     {"exact_std", truth.std},
                     {"inside", inside(truth.bias, measured.value.bias, measured.error.bias) &&
                                    inside(truth.std, measured.value.std, measured.error.std)}};
  if (const auto figure = published(shift, i)) {
    row["published_bias"] = figure->bias;
    row["published_std"] = figure->std;
  }
  return row;
}

void print(const nlohmann::json& row) {
  const auto number = [&](const char* key) { return row.at(key).get<double>(); };
  std::string figures;
  if (row.contains("published_std")) {
    char buffer[64];
    std::snprintf(buffer, sizeof buffer, "%6.3f %6.2f", number("published_bias"),
                  number("published_std"));
    figures = buffer;
  }
  std::printf("%5.1f  %-9s %8.4f +- %-6.4f %8.4f  %8.4f +- %-6.4f %8.4f  %-4s %s\n",
              number("shift"), row.at("estimator").get<std::string>().c_str(), number("bias"),
              number("bias_interval"), number("exact_bias"), number("std"), number("std_interval"),
              number("exact_std"), row.at("inside").get<bool>() ? "yes" : "no", figures.c_str());
}

}  // namespace
}  // namespace tether::bench

int main(int argc, char** argv) {
  using namespace tether::bench;
  int64_t samples = 10'000'000;
  uint64_t seed = 20200307;
  std::string path;
  CLI::App app("Bias and standard deviation of KL estimators, over the exact KL");
  app.add_option("--samples", samples, "for each pair of distributions")
      ->check(CLI::Range(int64_t{2}, int64_t{1} << 40))
      ->capture_default_str();
  app.add_option("--seed", seed)->capture_default_str();
  app.add_option("--json", path, "where the figures go");
  CLI11_PARSE(app, argc, argv);

  std::printf("KL(N(0, 1) || N(shift, 1)), %lld samples, seed %llu, 95 %% intervals\n",
              static_cast<long long>(samples), static_cast<unsigned long long>(seed));
  std::printf(
      "shift  estimator    bias / KL           exact    std / KL            exact  both  "
      "Schulman 2020\n");
  nlohmann::json rows = nlohmann::json::array();
  for (const double shift : {0.1, 0.5, 1.0}) {
    const auto measured = measure(shift, samples, seed);
    const auto truth = exact(shift);
    for (size_t i = 0; i < kEstimators.size(); ++i) {
      rows.push_back(row_of(shift, i, measured[i], truth[i]));
      print(rows.back());
    }
  }
  if (path.empty()) return 0;
  std::ofstream file(path);
  file << nlohmann::json{{"samples", samples}, {"seed", seed}, {"rows", rows}}.dump(1) << "\n";
  if (file.flush()) return 0;
  std::cerr << "estimator_variance: " << path << " cannot be written\n";
  return 1;
}
