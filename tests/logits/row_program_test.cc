#include "logits/row_program.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

#include "logits/rows.h"
#include "tests/host_team.h"
#include "tests/logits/rows_reference.h"
#include "tests/thread_team.h"

// The programs of the CUDA kernels on a team of host threads, in the shapes that rows.cu launches.

namespace tether {
namespace {

using namespace rows_test;

constexpr DType kDeviceTypes[] = {DType::float32, DType::bfloat16, DType::float16};

struct Results {
  std::vector<cuda::RowState> states;
  std::vector<float> logps, entropies, logsumexps, squared, means;
  std::vector<char> largest;

  explicit Results(size_t rows)
      : states(rows),
        logps(rows),
        entropies(rows),
        logsumexps(rows),
        squared(rows),
        means(rows),
        largest(rows) {}
  cuda::RowResults pointers() {
    return {states.data(),
            logps.data(),
            entropies.data(),
            logsumexps.data(),
            reinterpret_cast<bool*>(largest.data()),
            squared.data(),
            means.data()};
  }
};

// body.operator()<Stored, kCapped>()
template <class Body>
void with_types(const ConstLogits& logits, const RowOptions& options, Body body) {
  const auto with = [&]<class Stored>(Stored) {
    options.softcap > 0 ? body.template operator()<Stored, true>()
                        : body.template operator()<Stored, false>();
  };
  if (logits.dtype == DType::float32) with(float{});
  if (logits.dtype == DType::bfloat16) with(BFloat16{});
  if (logits.dtype == DType::float16) with(Float16{});
}

Results forward(const ConstLogits& logits, const int64_t* targets, const RowOptions& options,
                bool backwards = false) {
  Results out(static_cast<size_t>(logits.rows));
  with_types(logits, options, [&]<class Stored, bool kCapped>() {
    const HostTeam<cuda::kForwardThreads> team{backwards};
    const auto in = cuda::row_parameters<kCapped>(logits, targets, options);
    for (int64_t row = 0; row < logits.rows; ++row) {
      if (kCapped || options.sums == RowSums::all) {
        cuda::row_statistics_program<Stored, kCapped, true>(team, in, row, out.pointers());
      } else if constexpr (!kCapped) {
        cuda::row_statistics_program<Stored, kCapped, false>(team, in, row, out.pointers());
      }
    }
  });
  return out;
}

void backward(const ConstLogits& logits, const int64_t* targets, const RowOptions& options,
              const Results& results, const std::vector<float>& dlogps,
              const std::vector<float>& dentropies, const MutableLogits& dlogits,
              bool backwards = false) {
  const auto data = [](const std::vector<float>& x) { return x.empty() ? nullptr : x.data(); };
  with_types(logits, options, [&]<class Stored, bool kCapped>() {
    const HostTeam<cuda::kBackwardThreads> team{backwards};
    const auto in = cuda::row_parameters<kCapped>(logits, targets, options);
    const int pieces = cuda::pieces_of_row<Stored>(logits.vocabulary);
    for (int64_t row = 0; row < logits.rows; ++row) {
      for (int i = 0; i < pieces; ++i) {
        const int piece = backwards ? pieces - 1 - i : i;
        cuda::row_gradient_program<Stored, kCapped>(team, in, row, piece, pieces,
                                                    results.states.data(), data(dlogps),
                                                    data(dentropies), dlogits);
      }
    }
  });
}

std::vector<float> floats(const Doubles& values) { return {values.begin(), values.end()}; }

// Logits somewhere in a larger memory, whose other numbers no one may touch.
struct Placed {
  int64_t offset, row_stride, stride;
  Memory memory;

  static constexpr double kGuard = 777;

  Placed(const Batch& batch, DType dtype, int64_t first, int64_t gap, int64_t step)
      : offset(first),
        row_stride(batch.vocabulary * step + gap),
        stride(step),
        memory(dtype,
               Doubles(static_cast<size_t>(first + batch.rows() * row_stride + 32), kGuard)) {
    for (int64_t row = 0; row < batch.rows(); ++row) {
      for (int64_t v = 0; v < batch.vocabulary; ++v) {
        memory.set(at(row, v), batch.logits[static_cast<size_t>(row * batch.vocabulary + v)]);
      }
    }
  }
  size_t at(int64_t row, int64_t v) const {
    return static_cast<size_t>(offset + row * row_stride + v * stride);
  }
  template <class Byte>
  BasicLogits<Byte> view(const Batch& batch) {
    char* data = memory.as<char>() + offset * bytes_of(memory.dtype);
    return {data, memory.dtype, batch.rows(), batch.vocabulary, row_stride, stride};
  }
  Doubles values(const Batch& batch) {
    Doubles out;
    for (int64_t row = 0; row < batch.rows(); ++row) {
      for (int64_t v = 0; v < batch.vocabulary; ++v) out.push_back(memory.get(at(row, v)));
    }
    return out;
  }
  int64_t guards(const Batch& batch) {
    int64_t count = 0;
    for (size_t i = 0; i < memory.words.size(); ++i) count += memory.get(i) == kGuard;
    return count - std::ranges::count(values(batch), kGuard);
  }
};

// The definition within what floats allow: an ulp of t near the largest, of the sums a few more.
void expect_near_definition(const Batch& batch, DType dtype, const Results& got,
                            const Doubles& dlogits, const std::string& what) {
  const Result want = reference(batch, dtype);
  for (size_t row = 0; row < batch.targets.size(); ++row) {
    const double logp = want.logps[row], entropy = want.entropies[row];
    ASSERT_NEAR(got.logps[row], logp, 2e-6 * (1 + std::abs(logp))) << what;
    ASSERT_NEAR(got.entropies[row], entropy, 3e-6 * (1 + entropy)) << what;
  }
  const double slope = batch.options.scale / batch.options.temperature;
  for (size_t i = 0; i < dlogits.size(); ++i) {
    const size_t row = i / static_cast<size_t>(batch.vocabulary);
    const double upstreams = std::abs(upstream(batch.dlogps, row)) +
                             std::abs(upstream(batch.dentropies, row)) * (1 + want.entropies[row]);
    ASSERT_NEAR(dlogits[i], want.dlogits[i],
                1.01 * rounding(dtype, want.dlogits[i]) + 2e-6 * upstreams * slope)
        << what << " at " << i;
  }
}

void expect_right(const Batch& batch, DType dtype, int64_t offset, int64_t stride, bool in_place,
                  bool backwards, int64_t out_stride = 0) {
  const std::string what = name(dtype, batch.vocabulary) + " offset " + std::to_string(offset) +
                           " stride " + std::to_string(stride) + (in_place ? " in place" : "");
  Placed logits(batch, dtype, offset, 3, stride);
  Placed apart(batch, dtype, in_place ? offset : offset / 2, 3,
               out_stride > 0 ? out_stride : stride);
  const auto in = logits.view<const void>(batch);
  const Results got = forward(in, batch.targets.data(), batch.options, backwards);
  Placed& out = in_place ? logits : apart;
  const int64_t guards = out.guards(batch);
  backward(in, batch.targets.data(), batch.options, got, floats(batch.dlogps),
           floats(batch.dentropies), out.view<void>(batch), backwards);
  expect_near_definition(batch, dtype, got, out.values(batch), what);
  EXPECT_EQ(out.guards(batch), guards) << what;
}

TEST(RowProgram, MatchesTheDefinitionAtAnyPlace) {
  for (DType dtype : kDeviceTypes) {
    for (int64_t vocabulary : {1, 2, 7, 8, 9, 33, 1025, 8191, 16385}) {
      for (int64_t offset : {0, 1, 6, 8}) {
        for (bool in_place : {false, true}) {
          const Batch batch = random_batch(dtype, 2, vocabulary, 3);
          expect_right(batch, dtype, offset, 1, in_place, offset == 1);
        }
      }
      expect_right(random_batch(dtype, 2, vocabulary, 3), dtype, 1, 2, true, true);
      for (int64_t stride : {1, 2}) {  // the gradient's is the other one
        expect_right(random_batch(dtype, 2, vocabulary, 3), dtype, 8, stride, false, false,
                     3 - stride);
      }
    }
  }
}

TEST(RowProgram, MatchesTheDefinitionAtTheVocabularyOfAModel) {
  for (DType dtype : kDeviceTypes) {
    for (double scale : {0.1, 3.0, 30.0}) {
      Batch batch = random_batch(dtype, 2, 151936, scale);
      for (size_t i = 0; i < batch.logits.size(); i += 3) {
        if (static_cast<int64_t>(i % 151936) != batch.targets[i / 151936]) {
          batch.logits[i] = -infinity;
        }
      }
      expect_right(batch, dtype, 0, 1, true, false);
    }
  }
}

TEST(RowProgram, MatchesTheDefinitionUnderTemperatureScaleAndSoftcap) {
  for (DType dtype : kDeviceTypes) {
    for (double softcap : {0.0, 5.0}) {
      Batch batch = random_batch(dtype, 3, 2050, 4);
      batch.options = {.temperature = 0.7, .scale = 1.3, .softcap = softcap};
      expect_right(batch, dtype, 1, 1, true, false);
      batch.dlogps.clear();
      expect_right(batch, dtype, 0, 1, false, false);
    }
  }
}

// p = 0.999 of a bfloat16 target: its slope 1 - p has all digits of a bfloat16.
TEST(RowProgram, AConfidentTokenHasItsSlope) {
  for (int64_t vocabulary : {2, 1000, 151936}) {
    Batch batch = random_batch(DType::bfloat16, 2, vocabulary, 0);
    const double others = static_cast<double>(vocabulary - 1);
    for (size_t row = 0; row < 2; ++row) {
      const auto target = static_cast<size_t>(batch.targets[row]);
      batch.logits[row * static_cast<size_t>(vocabulary) + target] = std::log(999 * others);
    }
    batch.dentropies.clear();
    const Result want = reference(batch, DType::bfloat16);
    Placed logits(batch, DType::bfloat16, 0, 3, 1);
    const auto in = logits.view<const void>(batch);
    const Results got = forward(in, batch.targets.data(), batch.options, false);
    backward(in, batch.targets.data(), batch.options, got, floats(batch.dlogps), {},
             logits.view<void>(batch), false);
    const Doubles dlogits = logits.values(batch);
    for (size_t i = 0; i < dlogits.size(); ++i) {
      EXPECT_NEAR(dlogits[i], want.dlogits[i], 1.01 * rounding(DType::bfloat16, want.dlogits[i]))
          << vocabulary << " at " << i;
    }
  }
}

TEST(RowProgram, StatisticsAreThoseOfTheCpuKernel) {
  for (double softcap : {0.0, 5.0}) {
    Batch batch = random_batch(DType::bfloat16, 4, 5000, 3);
    batch.options = {.temperature = 0.7, .scale = 1.3, .softcap = softcap, .sums = RowSums::all};
    for (size_t i = 0; i < batch.logits.size(); i += 7) batch.logits[i] = -infinity;
    batch.targets[1] = 3;
    batch.logits[5000 + 3] = 50;
    batch.targets[2] = batch.options.ignore_index;
    Memory memory(batch.dtype, batch.logits);
    const ConstLogits in = batch.view(memory);
    const Results got = forward(in, batch.targets.data(), batch.options);
    std::vector<RowStatistics> want(4);
    row_statistics(in, batch.targets.data(), batch.options, want.data());
    for (size_t row = 0; row < 4; ++row) {
      const auto near = [&](float value, double expected) {
        EXPECT_NEAR(value, expected, 3e-6 * (1 + std::abs(expected))) << softcap << " " << row;
      };
      near(got.logps[row], logp(want[row], batch.options));
      near(got.entropies[row], entropy(want[row]));
      near(got.squared[row], sum_of_squared_p(want[row]));
      near(got.means[row], mean_logit(want[row], batch.options));
      EXPECT_EQ(bool(got.largest[row]), target_is_largest(want[row]));
      const double multiplier = (softcap > 0 ? 1 : 1.3) / 0.7;
      near(got.logsumexps[row],
           want[row].target_logit * multiplier - logp(want[row], batch.options));
    }
    EXPECT_TRUE(got.largest[1]);
    EXPECT_FALSE(got.largest[0]);
  }
}

TEST(RowProgram, IgnoredRowsAndRowsWithoutUpstreamAreNotRead) {
  Batch batch = random_batch(DType::float32, 3, 100, 1);
  batch.targets[0] = batch.options.ignore_index;
  batch.dlogps[1] = batch.dentropies[1] = 0;
  for (size_t i = 0; i < 100; ++i) batch.logits[i] = kNan;
  Memory memory(batch.dtype, batch.logits);
  const ConstLogits in = batch.view(memory);
  const Results got = forward(in, batch.targets.data(), batch.options);
  EXPECT_EQ(got.logps[0], 0);
  EXPECT_EQ(got.entropies[0], 0);
  for (size_t i = 100; i < 200; ++i) memory.set(i, kNan);
  const MutableLogits out{memory.words.data(), batch.dtype, 3, 100, 100};
  backward(in, batch.targets.data(), batch.options, got, floats(batch.dlogps),
           floats(batch.dentropies), out);
  for (size_t i = 0; i < 200; ++i) EXPECT_EQ(memory.get(i), 0);
  EXPECT_NE(memory.get(250), 0);
}

// A row of these logits, and whether every number of its gradient is NaN.
void expect_nan(const Doubles& logits, int64_t target, double softcap = 0) {
  Batch batch = {.dtype = DType::float32,
                 .vocabulary = static_cast<int64_t>(logits.size()),
                 .logits = logits,
                 .targets = {target},
                 .options = {.softcap = softcap},
                 .dlogps = {1},
                 .dentropies = {0}};
  Memory memory(batch.dtype, batch.logits);
  const ConstLogits in = batch.view(memory);
  const Results got = forward(in, batch.targets.data(), batch.options);
  EXPECT_TRUE(std::isnan(got.logps[0]) && std::isnan(got.entropies[0]));
  backward(in, batch.targets.data(), batch.options, got, {1}, {},
           {memory.words.data(), batch.dtype, 1, batch.vocabulary, batch.vocabulary});
  for (double value : memory.values(batch.vocabulary)) EXPECT_TRUE(std::isnan(value));
}

TEST(RowProgram, NanAndInfinityAndBadTargetsComeOutAsNan) {
  expect_nan({0, kNan, 1, 2, 3, 4, 5}, 0);
  expect_nan({0, 1, infinity, 2, -infinity}, 1);
  expect_nan({0, 1, infinity, 2, -infinity}, 1, 5);
  expect_nan(Doubles(9, -infinity), 1);
  expect_nan({0, 1, 2}, 3);
  expect_nan({0, 1, 2}, -1);
}

// Differences and products of these overflow.
TEST(RowProgram, FiniteLogitsOfAnySizeGiveFiniteNumbers) {
  constexpr double kHuge = 3e38;
  Batch batch = {.dtype = DType::float32,
                 .vocabulary = 3000,
                 .logits = Doubles(3000, -kHuge),
                 .targets = {7},
                 .options = {.temperature = 1e-6, .scale = 1e6},
                 .dlogps = {1},
                 .dentropies = {1}};
  batch.logits[7] = batch.logits[2999] = kHuge;
  expect_right(batch, DType::float32, 1, 1, true, false);
}

// A target that is not there has logp -inf and no gradient of its own; the others have theirs.
TEST(RowProgram, TargetsThatAreNotThereHaveNoGradient) {
  Batch batch = random_batch(DType::bfloat16, 1, 300, 1);
  batch.logits[static_cast<size_t>(batch.targets[0])] = -infinity;
  Memory memory(batch.dtype, batch.logits);
  const Results got = forward(batch.view(memory), batch.targets.data(), batch.options);
  EXPECT_EQ(got.logps[0], -infinity);
  backward(batch.view(memory), batch.targets.data(), batch.options, got, {1}, {},
           {memory.words.data(), batch.dtype, 1, 300, 300});
  for (size_t i = 0; i < 300; ++i) {
    const bool absent = static_cast<int64_t>(i) == batch.targets[0];
    EXPECT_EQ(memory.get(i) == 0, absent) << i;
  }
}

// However large the upstream gradients, and no numbers too.
TEST(RowProgram, ColumnsThatAreNotThereGetZeros) {
  for (double large : {1e38, infinity, kNan}) {
    Batch batch = random_batch(DType::float32, 1, 300, 1);
    for (size_t i = 0; i < 300; i += 2) batch.logits[i] = i % 4 == 0 ? -infinity : -1000;
    batch.targets = {1};
    Memory memory(batch.dtype, batch.logits);
    const ConstLogits in = batch.view(memory);
    const Results got = forward(in, batch.targets.data(), batch.options);
    backward(in, batch.targets.data(), batch.options, got, floats({large}), floats({large}),
             {memory.words.data(), batch.dtype, 1, 300, 300});
    for (size_t i = 0; i < 300; i += 2) EXPECT_EQ(memory.get(i), 0) << large << " at " << i;
  }
}

// A row's gradients by the program and by the CPU kernel: near, or the same infinity, or both NaN.
void expect_cpu_gradients(const Batch& batch, const std::string& what) {
  const Doubles want = batch.run().dlogits;
  Memory memory(batch.dtype, batch.logits);
  const ConstLogits in = batch.view(memory);
  const Results found = forward(in, batch.targets.data(), batch.options);
  backward(in, batch.targets.data(), batch.options, found, floats(batch.dlogps),
           floats(batch.dentropies),
           {memory.words.data(), batch.dtype, 1, batch.vocabulary, batch.vocabulary});
  const Doubles got = memory.values(batch.vocabulary);
  const double size = std::abs(batch.dlogps[0]) + 10 * std::abs(batch.dentropies[0]);
  for (size_t i = 0; i < want.size(); ++i) {
    const double bound = 2.02 * rounding(batch.dtype, want[i]) + 1e-6 * size;
    const bool same = std::isfinite(want[i]) ? std::abs(got[i] - want[i]) <= bound
                      : std::isnan(want[i])  ? std::isnan(got[i])
                                             : got[i] == want[i];
    ASSERT_TRUE(same) << what << " at " << i << ": " << got[i] << ", not " << want[i];
  }
}

// However far beyond a float their products are.
TEST(RowProgram, LargeUpstreamGradientsGiveThoseOfTheCpuKernel) {
  const Doubles sizes{1e18, 2e18, 1e38, -3e38, infinity, -infinity, 0, 1};
  for (DType dtype : kDeviceTypes) {
    Batch batch = random_batch(dtype, 1, 500, 3);
    for (double softcap : {0.0, 5.0}) {
      batch.options = {.temperature = 0.7, .scale = 1.3, .softcap = softcap};
      for (double dlogp : sizes) {
        for (double dentropy : sizes) {
          batch.dlogps = {dlogp};
          batch.dentropies = {dentropy};
          expect_cpu_gradients(batch, name(dtype, 500) + ": " + std::to_string(dlogp) + ", " +
                                          std::to_string(dentropy));
        }
      }
    }
  }
}

// Real threads: those of all rows and pieces at once, in place. ThreadSanitizer looks for races,
// and the bits are those of a team on one thread.
TEST(RowProgram, ThreadsOfATeamDoNotRace) {
  constexpr int kThreads = 64, kPieces = 3;
  Batch batch = random_batch(DType::bfloat16, 3, kThreads * 4 * 8 * 2 + 77, 3);
  batch.targets[1] = batch.options.ignore_index;
  const auto run = [&](Memory& memory, const auto& run_teams) {
    const auto in =
        cuda::row_parameters<false>(batch.view(memory), batch.targets.data(), batch.options);
    EXPECT_EQ((cuda::pieces_of_row<BFloat16, kThreads>(batch.vocabulary)), kPieces);
    Results results(3);
    const auto dlogps = floats(batch.dlogps), dentropies = floats(batch.dentropies);
    const MutableLogits out{memory.words.data(), batch.dtype, 3, batch.vocabulary,
                            batch.vocabulary};
    run_teams(3, [&](const auto& team, int row) {
      cuda::row_statistics_program<BFloat16, false, false>(team, in, row, results.pointers());
    });
    run_teams(3 * kPieces, [&](const auto& team, int i) {
      cuda::row_gradient_program<BFloat16, false>(team, in, i / kPieces, i % kPieces, kPieces,
                                                  results.states.data(), dlogps.data(),
                                                  dentropies.data(), out);
    });
    return results.logps;
  };
  Memory by_threads(batch.dtype, batch.logits), alone(batch.dtype, batch.logits);
  const auto logps = run(by_threads, [](int teams, const auto& program) {
    ThreadTeam<kThreads>::run(teams, program);
  });
  const auto expected = run(alone, [](int teams, const auto& program) {
    for (int i = 0; i < teams; ++i) program(HostTeam<kThreads>{}, i);
  });
  EXPECT_EQ(logps, expected);
  EXPECT_EQ(by_threads.words, alone.words);
}

// Beyond 2^31 numbers: rows that start there, seen through strides that go back.
TEST(RowProgram, OffsetsAreOf64Bits) {
  const ConstLogits logits{nullptr, DType::bfloat16, int64_t{1} << 22, 151936, 151936};
  EXPECT_EQ(logits.offset((int64_t{1} << 22) - 1), ((int64_t{1} << 22) - 1) * 151936);
  const cuda::RowParts<BFloat16> parts(int64_t{1} << 31, true, 2);
  EXPECT_EQ(parts.head, 7);
  EXPECT_EQ(parts.head + parts.vectors * 8 + (parts.singles - parts.head), int64_t{1} << 31);
  EXPECT_EQ(parts.column_of_single(parts.singles - 1), (int64_t{1} << 31) - 1);
  EXPECT_EQ(cuda::pieces_of_row<float>(int64_t{1} << 31), 1 << 19);
}

}  // namespace
}  // namespace tether
