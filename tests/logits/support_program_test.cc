#include "logits/support_program.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

#include "tests/device_types.h"
#include "tests/host_team.h"
#include "tests/logits/support_batch.h"
#include "tests/thread_team.h"

// The programs of the CUDA kernels on a team of host threads, in the shapes that support.cu
// launches.

namespace tether {
namespace {

using namespace rows_test;

constexpr int kThreads = cuda::kSupportThreads;

std::vector<float> floats(const Doubles& values) { return {values.begin(), values.end()}; }

struct Found {
  std::vector<cuda::RowState> states;
  std::vector<float> logps, entropies, squared, means;

  explicit Found(const Batch& batch)
      : states(batch.targets.size()),
        logps(states.size()),
        entropies(logps),
        squared(logps),
        means(logps) {}
  cuda::RowResults pointers() {
    return {.states = states.data(),
            .logps = logps.data(),
            .entropies = entropies.data(),
            .sums_of_squared_p = squared.data(),
            .mean_logits = means.data()};
  }
};

struct How {
  bool packed = false, in_place = false, backwards = false;
  int64_t offset = 0, stride = 1;
};

// Logits in a larger memory, whose other numbers no one may touch.
struct Placed {
  static constexpr double kGuard = 768;
  const Batch& batch;
  How how;
  Memory memory;

  Placed(const Batch& of, const How& at)
      : batch(of), how(at), memory(of.dtype, Doubles(place(of.logits.size() + 40), kGuard)) {
    for (size_t i = 0; i < of.logits.size(); ++i) memory.set(place(i), of.logits[i]);
  }
  size_t place(size_t i) const { return static_cast<size_t>(how.offset) + i * size_t(how.stride); }
  template <class Byte>
  BasicLogits<Byte> view() {
    return {memory.as<char>() + how.offset * bytes_of(batch.dtype),
            batch.dtype,
            batch.rows(),
            batch.vocabulary,
            batch.vocabulary * how.stride,
            how.stride};
  }
  // Also that the guards are there.
  Doubles values() {
    Doubles out;
    size_t guards = 0;
    for (size_t i = 0; i < memory.words.size(); ++i) guards += memory.get(i) == kGuard ? 1 : 0;
    for (size_t i = 0; i < batch.logits.size(); ++i) out.push_back(memory.get(place(i)));
    EXPECT_EQ(guards, memory.words.size() - out.size());
    return out;
  }
};

template <class Run>
Result run_program(const Batch& batch, const KeptIds& kept, const How& how, Run run) {
  Placed in(batch, how), apart(batch, {.offset = how.offset / 2, .stride = how.stride});
  Placed& out = how.in_place ? in : apart;
  Found found(batch);
  run(in.view<const void>(), kept, out.view<void>(), found);
  return {{found.logps.begin(), found.logps.end()},
          {found.entropies.begin(), found.entropies.end()},
          out.values()};
}

Result run_program(const Batch& batch, const KeptIds& kept, const How& how = {}) {
  return run_program(
      batch, kept, how, [&](const auto& logits, const auto& ids, const auto& out, Found& found) {
        const auto dlogps = floats(batch.dlogps), dentropies = floats(batch.dentropies);
        std::vector<float> memory(2 * batch.logits.size() + 100);
        const HostTeam<kThreads> team{how.backwards};
        const auto with_cap = [&]<class Stored, bool kCapped>() {
          const auto in =
              cuda::row_parameters<kCapped>(logits, batch.targets.data(), batch.options);
          const int pieces = cuda::pieces_of_row<Stored, kThreads>(batch.vocabulary);
          for (int64_t row = 0; row < batch.rows(); ++row) {
            cuda::support_statistics_program<Stored>(team, in, ids, row, found.pointers());
          }
          for (int64_t row = 0; row < batch.rows(); ++row) {
            cuda::support_gradient_program<Stored>(team, in, ids, row, pieces, found.states.data(),
                                                   dlogps.data(), dentropies.data(), memory.data(),
                                                   out);
          }
        };
        with_device_type(batch.dtype, [&]<class Stored>(Stored) {
          batch.options.softcap > 0 ? with_cap.template operator()<Stored, true>()
                                    : with_cap.template operator()<Stored, false>();
        });
      });
}

Result run_program(const Batch& batch, const Sets& sets, const How& how = {}) {
  Kept kept;
  how.packed ? pack(sets, kept) : pad(sets, kept);
  return run_program(batch, kept.view, how);
}

// Within what floats allow, and exactly 0 where nothing was kept.
void expect_near_definition(const Result& got, const Batch& batch, const Sets& sets,
                            const std::string& what) {
  const Result want = reference(with_others(batch, sets, -infinity), batch.dtype);
  const double slope = batch.options.scale / batch.options.temperature;
  for (size_t row = 0; row < batch.targets.size(); ++row) {
    ASSERT_NEAR(got.logps[row], want.logps[row], 2e-6 * (1 + std::abs(want.logps[row]))) << what;
    ASSERT_NEAR(got.entropies[row], want.entropies[row], 3e-6 * (1 + want.entropies[row])) << what;
    const std::vector<bool> counts = counted(batch, sets, row);
    const double upstreams =
        std::abs(batch.dlogps[row]) + std::abs(batch.dentropies[row]) * (1 + want.entropies[row]);
    for (size_t v = 0; v < counts.size(); ++v) {
      const size_t i = row * counts.size() + v;
      ASSERT_NEAR(got.dlogits[i], want.dlogits[i],
                  1.01 * rounding(batch.dtype, want.dlogits[i]) + 2e-6 * upstreams * slope)
          << what << " at " << v << " of row " << row;
      ASSERT_TRUE(counts[v] || got.dlogits[i] == 0) << what;
    }
  }
}

TEST(SupportProgram, MatchesTheDefinitionOfTheKeptLogits) {
  for (DType dtype : kDeviceTypes) {
    for (int64_t vocabulary : {1, 2, 9, 300, 9001}) {
      for (int64_t size : {1, 3, 40, 700}) {
        for (bool in_place : {false, true}) {
          Batch batch = random_batch(dtype, 4, vocabulary, 3);
          batch.options = {.temperature = 0.7, .scale = 1.3, .softcap = size == 40 ? 5.0 : 0};
          const Sets sets = device_sets(batch, size);
          const How how{.packed = size == 3,
                        .in_place = in_place,
                        .backwards = size == 700,
                        .offset = size % 2 == 0 ? 0 : 3,
                        .stride = vocabulary == 300 ? 2 : 1};
          // What is not kept is not read.
          const Result got = run_program(with_others(batch, sets, kNan), sets, how);
          expect_near_definition(got, batch, sets, name(dtype, vocabulary));
        }
      }
    }
  }
}

TEST(SupportProgram, FurtherStatisticsAreThoseOfTheCpuKernel) {
  Batch batch = random_batch(DType::float32, 4, 500, 3);
  batch.options = {.temperature = 0.7, .scale = 1.3, .sums = RowSums::all};
  batch.targets[2] = batch.options.ignore_index;
  Kept kept;
  pad(random_sets(random_batch(DType::float32, 4, 500, 3), 30), kept);
  kept.view.layout.rows = 4;
  std::vector<RowStatistics> want(4);
  Memory memory(batch.dtype, batch.logits);
  // Row 1 lacks its target here, and so has another.
  batch.targets[1] = kept.ids[kept.ids.size() / 4 + 1];
  support_statistics(batch.view(memory), batch.targets.data(), kept.view, batch.options,
                     want.data());
  Found got(batch);
  const auto in =
      cuda::row_parameters<false>(batch.view(memory), batch.targets.data(), batch.options);
  for (int64_t row = 0; row < 4; ++row) {
    cuda::support_statistics_program<float>(HostTeam<kThreads>{}, in, kept.view, row,
                                            got.pointers());
  }
  for (size_t row = 0; row < 4; ++row) {
    EXPECT_NEAR(got.squared[row], sum_of_squared_p(want[row]), 3e-6);
    EXPECT_NEAR(got.means[row], mean_logit(want[row], batch.options), 3e-6);
    EXPECT_EQ(got.states[row].columns, static_cast<float>(want[row].columns));
  }
}

TEST(SupportProgram, IgnoredRowsAndThoseWithoutUpstreamAreNotRead) {
  Batch batch = random_batch(DType::bfloat16, 4, 200, 1);
  Sets sets = device_sets(batch, 5);
  sets[0] = {777, -5};
  batch.targets[0] = batch.options.ignore_index;
  batch.dlogps[1] = batch.dentropies[1] = 0;
  std::fill_n(batch.logits.begin(), 400, kNan);
  const Result got = run_program(batch, sets, {.in_place = true});
  EXPECT_EQ(got.logps[0], 0);
  EXPECT_EQ(got.entropies[0], 0);
  for (size_t i = 0; i < 400; ++i) EXPECT_EQ(got.dlogits[i], 0);
  EXPECT_NE(got.dlogits[400 + static_cast<size_t>(batch.targets[2])], 0);
}

// Nothing is written beside the row either.
TEST(SupportProgram, UnknownIdsAndSetsWithoutTheirTargetAreNan) {
  for (int64_t unknown : {int64_t{200}, int64_t{-2}, int64_t{1} << 40}) {
    Batch batch = random_batch(DType::float32, 3, 200, 1);
    Sets sets = device_sets(batch, 5);
    sets[0].push_back(unknown);
    std::erase(sets[1], batch.targets[1]);
    const Result got = run_program(batch, sets, {.in_place = true, .offset = 1});
    for (size_t row = 0; row < 3; ++row) {
      EXPECT_EQ(std::isnan(got.logps[row]), row < 2) << unknown;
      EXPECT_EQ(std::isnan(got.entropies[row]), row < 2) << unknown;
      for (int64_t v = 0; v < 200; ++v) {
        const double each = got.dlogits[row * 200 + static_cast<size_t>(v)];
        const bool kept = std::ranges::count(sets[row], v) > 0;
        EXPECT_EQ(std::isnan(each), row < 2 && kept) << v;
        EXPECT_TRUE(kept || each == 0);
      }
    }
    batch.targets[2] = 200;
    EXPECT_TRUE(std::isnan(run_program(batch, sets).logps[2]));
  }
}

// Of ids one row after the other too: rows run side by side.
TEST(SupportProgram, EachRowHasMemoryOfItsOwn) {
  Batch batch = random_batch(DType::float32, 4, 90, 1);
  for (double& logit : batch.logits) logit += 1000;  // none is a gradient
  const Sets sets{{1, 5, 7, batch.targets[0]}, {batch.targets[1]}, {}, {80, batch.targets[3]}};
  Kept kept;
  pack(sets, kept);
  std::vector<float> memory(kept.narrow.size());
  run_program(batch, kept.view, {.in_place = true},
              [&](const auto& logits, const auto& ids, const auto& out, Found& found) {
                const HostTeam<kThreads> team;
                const auto in =
                    cuda::row_parameters<false>(logits, batch.targets.data(), batch.options);
                const auto dlogps = floats(batch.dlogps);
                for (int64_t row = 0; row < 4; ++row) {
                  cuda::support_statistics_program<float>(team, in, ids, row, found.pointers());
                  cuda::support_gradient_program<float>(team, in, ids, row, 1, found.states.data(),
                                                        dlogps.data(), nullptr, memory.data(), out);
                }
              });
  size_t place = 0;
  for (size_t row = 0; row < 4; ++row) {
    for (const int64_t id : sets[row]) {
      const double logit = batch.logits[row * 90 + static_cast<size_t>(id)];
      EXPECT_EQ(memory[place++], static_cast<float>(logit));
    }
  }
}

// Real threads, all rows at once, in place: the bits are those of a team on one thread.
TEST(SupportProgram, ThreadsOfATeamDoNotRace) {
  constexpr int kFew = 64;
  const Batch batch = random_batch(DType::bfloat16, 4, kFew * 4 * 8 + 77, 3);
  const Sets sets = device_sets(batch, 300);
  Kept kept;
  pad(sets, kept);
  const auto run = [&](const auto& run_teams) {
    return run_program(
        batch, kept.view, {.in_place = true},
        [&](const auto& logits, const auto& ids, const auto& out, Found& found) {
          const auto in = cuda::row_parameters<false>(logits, batch.targets.data(), batch.options);
          const auto dlogps = floats(batch.dlogps), dentropies = floats(batch.dentropies);
          std::vector<float> memory(kept.ids.size());
          run_teams([&](const auto& team, int row) {
            cuda::support_statistics_program<BFloat16>(team, in, ids, row, found.pointers());
          });
          run_teams([&](const auto& team, int row) {
            cuda::support_gradient_program<BFloat16>(team, in, ids, row, 2, found.states.data(),
                                                     dlogps.data(), dentropies.data(),
                                                     memory.data(), out);
          });
        });
  };
  const Result by_threads = run([](const auto& program) { ThreadTeam<kFew>::run(4, program); });
  const Result alone = run([](const auto& program) {
    for (int row = 0; row < 4; ++row) program(HostTeam<kFew>{}, row);
  });
  EXPECT_EQ(by_threads.logps, alone.logps);
  EXPECT_EQ(by_threads.dlogits, alone.dlogits);
}

}  // namespace
}  // namespace tether
