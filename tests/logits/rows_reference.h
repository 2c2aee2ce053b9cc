#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "core/half.h"
#include "logits/rows.h"

// Batches of logits for the tests of logits/rows.h, and the definition of its results in long
// double.

namespace tether::rows_test {

using Doubles = std::vector<double>;

inline constexpr double kNan = std::numeric_limits<double>::quiet_NaN();
inline constexpr DType kAllTypes[] = {DType::float32, DType::float64, DType::bfloat16,
                                      DType::float16};

// ---- memory of any type -------------------------------------------------------------------------

struct Memory {
  DType dtype = DType::float32;
  std::vector<double> words;  // suitably aligned for every type

  Memory(DType type, int64_t size) : dtype(type), words(static_cast<size_t>(size)) {}
  Memory(DType type, const Doubles& values) : Memory(type, static_cast<int64_t>(values.size())) {
    for (size_t i = 0; i < values.size(); ++i) set(i, values[i]);
  }
  template <class T>
  T* as() {
    return reinterpret_cast<T*>(words.data());
  }
  void set(size_t i, double value) {
    const float narrow = static_cast<float>(value);
    if (dtype == DType::float32) as<float>()[i] = narrow;
    if (dtype == DType::float64) as<double>()[i] = value;
    if (dtype == DType::bfloat16) as<uint16_t>()[i] = to_bfloat16(narrow);
    if (dtype == DType::float16) as<uint16_t>()[i] = to_float16(narrow);
  }
  double get(size_t i) {
    if (dtype == DType::float32) return as<float>()[i];
    if (dtype == DType::float64) return as<double>()[i];
    return dtype == DType::bfloat16 ? from_bfloat16(as<uint16_t>()[i])
                                    : from_float16(as<uint16_t>()[i]);
  }
  Doubles values(int64_t count) {
    Doubles out;
    for (int64_t i = 0; i < count; ++i) out.push_back(get(static_cast<size_t>(i)));
    return out;
  }
};

// Rounding to nearest of this value: half a unit of its last place.
inline double rounding(DType dtype, double value) {
  const double power = value == 0 ? 0 : std::ldexp(1, std::ilogb(value));
  if (dtype == DType::float64) return 0x1p-53 * power;
  if (dtype == DType::float32) return 0x1p-24 * power;
  return dtype == DType::bfloat16 ? 0x1p-8 * power : std::max(0x1p-11 * power, 0x1p-25);
}

// ---- the layer and its definition on whole batches ---------------------------------------------

struct Result {
  Doubles logps, entropies, dlogits;
};

struct Batch {
  DType dtype = DType::float64;
  int64_t vocabulary = 0;
  Doubles logits;
  std::vector<int64_t> targets;
  RowOptions options = {};
  Doubles dlogps = {}, dentropies = {};

  int64_t rows() const { return static_cast<int64_t>(targets.size()); }
  ConstLogits view(Memory& memory) const {
    return {memory.words.data(), memory.dtype, rows(), vocabulary, vocabulary};
  }
  static const double* data(const Doubles& values) {
    return values.empty() ? nullptr : values.data();
  }

  Result run(const Executor& executor = {}) const {
    Memory memory(dtype, logits);
    Memory gradient(dtype, static_cast<int64_t>(logits.size()));
    return run_on(view(memory), gradient, executor);
  }
  // On logits laid out in any way; `gradient` gets them side by side.
  Result run_on(const ConstLogits& in, Memory& gradient, const Executor& executor = {}) const {
    std::vector<RowStatistics> statistics(targets.size());
    row_statistics(in, targets.data(), options, statistics.data(), executor);
    Result result;
    for (const RowStatistics& row : statistics) {
      result.logps.push_back(logp(row, options));
      result.entropies.push_back(entropy(row));
    }
    const MutableLogits out = {gradient.words.data(), dtype, rows(), vocabulary, vocabulary};
    row_gradients(in, targets.data(), options, statistics.data(), data(dlogps), data(dentropies),
                  out, executor);
    result.dlogits = gradient.values(rows() * vocabulary);
    return result;
  }
};

inline double upstream(const Doubles& values, size_t row) {
  return values.empty() ? 0 : values[row];
}

// The definition, in long double, column by column; columns of -inf left out.
inline Result reference(const Batch& batch, DType dtype) {
  Result result;
  Memory rounded(dtype, batch.logits);
  const size_t vocabulary = static_cast<size_t>(batch.vocabulary);
  const long double temperature = batch.options.temperature;
  const long double scale = batch.options.scale, cap = batch.options.softcap;
  for (size_t row = 0; row < batch.targets.size(); ++row) {
    std::vector<long double> x;
    std::vector<long double> slopes;  // dx / dlogit
    for (size_t v = 0; v < vocabulary; ++v) {
      const long double logit = scale * static_cast<long double>(rounded.get(row * vocabulary + v));
      const bool capped = cap > 0 && logit > -infinity;
      const long double tanh = capped ? std::tanh(logit / cap) : 0;
      x.push_back(capped ? cap * tanh : logit);
      slopes.push_back(scale * (1 - tanh * tanh));
    }
    const long double max = *std::max_element(x.begin(), x.end());
    long double sum = 0;
    for (long double logit : x) sum += std::exp((logit - max) / temperature);
    const auto log_p = [&](size_t v) { return (x[v] - max) / temperature - std::log(sum); };
    long double entropy = 0;
    for (size_t v = 0; v < vocabulary; ++v) {
      if (std::exp(log_p(v)) > 0) entropy -= std::exp(log_p(v)) * log_p(v);
    }
    const size_t target = static_cast<size_t>(batch.targets[row]);
    result.logps.push_back(static_cast<double>(log_p(target)));
    result.entropies.push_back(static_cast<double>(entropy));
    const long double u = upstream(batch.dlogps, row), e = upstream(batch.dentropies, row);
    for (size_t v = 0; v < vocabulary; ++v) {
      const long double p = std::exp(log_p(v));
      const long double inner = p > 0 ? u * p + e * p * (log_p(v) + entropy) : 0;
      const long double dx = ((v == target ? u : 0) - inner) / temperature;
      result.dlogits.push_back(static_cast<double>(dx * slopes[v]));
    }
  }
  return result;
}

inline Doubles normal(int64_t count, double scale, unsigned seed) {
  std::mt19937 generator(seed);
  std::normal_distribution<double> distribution;
  Doubles values(static_cast<size_t>(count));
  for (double& value : values) value = scale * distribution(generator);
  return values;
}

inline Batch random_batch(DType dtype, int64_t rows, int64_t vocabulary, double scale,
                          unsigned seed = 1) {
  Batch batch = {.dtype = dtype,
                 .vocabulary = vocabulary,
                 .logits = normal(rows * vocabulary, scale, seed),
                 .targets = {}};
  std::mt19937 generator(seed);
  std::uniform_int_distribution<int64_t> id(0, vocabulary - 1);
  for (int64_t row = 0; row < rows; ++row) batch.targets.push_back(id(generator));
  batch.dlogps = normal(rows, 1, seed + 1);
  batch.dentropies = normal(rows, 1, seed + 2);
  return batch;
}

inline double largest(const Doubles& values) {
  double largest = 0;
  for (double value : values) largest = std::max(largest, std::abs(value));
  return largest;
}

inline void expect_near(const Doubles& got, const Doubles& want, double bound,
                        const std::string& what) {
  ASSERT_EQ(got.size(), want.size());
  for (size_t i = 0; i < got.size(); ++i) {
    ASSERT_NEAR(got[i], want[i], bound) << what << " at " << i << " of " << got.size();
  }
}

// Bounds for a float or double pass: 4 ulp of the largest logit after division by the temperature,
// 16 of the entropy's terms |t| p, and those of both upstream gradients.
inline void expect_close(const Result& got, const Result& want, const Batch& batch,
                         const std::string& what) {
  const double ulp = batch.dtype == DType::float64 ? 0x1p-52 : 0x1p-23;
  const double scale = batch.options.scale / batch.options.temperature;
  const double size = std::max(1.0, largest(batch.logits) * scale);
  expect_near(got.logps, want.logps, 4 * ulp * size, what + " logp");
  expect_near(got.entropies, want.entropies, 16 * ulp * size, what + " entropy");
  const double weight = (largest(batch.dlogps) + largest(batch.dentropies) * size) * scale;
  for (size_t i = 0; i < want.dlogits.size(); ++i) {
    ASSERT_NEAR(got.dlogits[i], want.dlogits[i],
                rounding(batch.dtype, want.dlogits[i]) + 8 * ulp * weight)
        << what << " gradient at " << i;
  }
}

// The gradient of run(batch) is the derivative of its values, by finite differences.
template <class Run>
void expect_derivative(const Batch& batch, Run run) {
  const Doubles gradient = run(batch).dlogits;
  const auto objective = [&](const Batch& at) {
    const Result result = run(at);
    double sum = 0;
    for (size_t row = 0; row < batch.targets.size(); ++row) {
      sum += batch.dlogps[row] * result.logps[row] + batch.dentropies[row] * result.entropies[row];
    }
    return sum;
  };
  const double step = 1e-5;
  for (size_t i = 0; i < gradient.size(); ++i) {
    Batch up = batch, down = batch;
    up.logits[i] += step;
    down.logits[i] -= step;
    EXPECT_NEAR(gradient[i], (objective(up) - objective(down)) / (2 * step), 1e-9) << i;
  }
}

// The gradients of each upstream alone add up.
template <class Run>
void expect_sum_of_upstreams(const Batch& both, Run run) {
  Batch values = both, entropies = both;
  values.dentropies.clear();
  entropies.dlogps.clear();
  Doubles sum = run(values).dlogits;
  const Doubles rest = run(entropies).dlogits;
  for (size_t i = 0; i < sum.size(); ++i) sum[i] += rest[i];
  expect_near(run(both).dlogits, sum, 1e-14, "sum");
}

inline std::string name(DType dtype, int64_t vocabulary) {
  const char* names[] = {"none", "float32", "float64", "bfloat16", "float16"};
  return std::string(names[static_cast<int>(dtype)]) + " V=" + std::to_string(vocabulary);
}

}  // namespace tether::rows_test
