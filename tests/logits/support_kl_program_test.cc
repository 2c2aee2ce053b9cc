#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "logits/support_program.h"
#include "tests/device_types.h"
#include "tests/host_team.h"
#include "tests/logits/pairs_reference.h"
#include "tests/logits/support_batch.h"
#include "tests/thread_team.h"

// The program of divergences over kept ids on a team of host threads, in the shape that support.cu
// launches.

namespace tether {
namespace {

using namespace rows_test;

constexpr int kThreads = cuda::kSupportThreads;

using pairs_test::Pairs, pairs_test::PairResult;

struct PairFound {
  std::vector<float> upstream, values;
  size_t rows;

  explicit PairFound(const Pairs& in) : values(in.upstream.size() * 3), rows(in.upstream.size()) {
    for (auto each : {&LogitsKl::kl, &LogitsKl::reverse_kl, &LogitsKl::entropy}) {
      for (const LogitsKl& row : in.upstream) upstream.push_back(static_cast<float>(row.*each));
    }
  }
  cuda::PairKlArrays<const float> in() const {
    return {upstream.data(), upstream.data() + rows, upstream.data() + 2 * rows};
  }
  cuda::PairKlArrays<float> out() {
    return {values.data(), values.data() + rows, values.data() + 2 * rows};
  }
  Doubles part(size_t i) const {
    const auto begin = values.begin() + static_cast<int64_t>(i * rows);
    return {begin, begin + static_cast<int64_t>(rows)};
  }
};

// run_rows(program of a team and a row)
template <class RunRows>
PairResult run_pairs(const Pairs& in, const Sets& sets, bool in_place, const uint8_t* active,
                     RunRows run_rows) {
  Kept kept;
  in_place ? pack(sets, kept) : pad(sets, kept);
  Memory q(in.dtype, in.q), p(in.dtype, in.p), dq(in.dtype, Doubles(in.q.size(), 7)), dp = dq;
  PairFound found(in), alone(in);
  std::vector<float> memory(2 * (kept.ids.size() + kept.narrow.size()));
  Memory& q_out = in_place ? q : dq;
  Memory& p_out = in_place ? p : dp;
  const auto parameters = cuda::pair_parameters(view(in, q), view(in, p), in.temperature, active);
  with_device_type(in.dtype, [&]<class Stored>(Stored) {
    run_rows([&](const auto& team, int row) {
      cuda::support_kl_program<Stored>(team, parameters, kept.view, row, {}, alone.out(), nullptr,
                                       {}, {});
    });
    run_rows([&](const auto& team, int row) {
      cuda::support_kl_program<Stored>(team, parameters, kept.view, row, found.in(), found.out(),
                                       memory.data(), out_view(in, q_out), out_view(in, p_out));
    });
  });
  for (size_t i = 0; i < found.values.size(); ++i) {
    const bool same = std::isnan(found.values[i]) && std::isnan(alone.values[i]);
    EXPECT_TRUE(same || found.values[i] == alone.values[i]);
  }
  const auto size = static_cast<int64_t>(in.q.size());
  return {found.part(0), found.part(1), found.part(2), q_out.values(size), p_out.values(size)};
}

PairResult run_pairs(const Pairs& in, const Sets& sets, bool in_place = false,
                     const uint8_t* active = nullptr) {
  return run_pairs(in, sets, in_place, active, [&](const auto& program) {
    const HostCluster<kThreads> team{.backwards = in_place};
    for (int row = 0; row < static_cast<int>(in.rows); ++row) program(team, row);
  });
}

// Both rows with `value` in what is not kept.
Pairs with_others(Pairs in, const Sets& sets, double value) {
  const auto size = static_cast<size_t>(in.vocabulary);
  for (size_t i = 0; i < in.q.size(); ++i) {
    const auto& set = sets[i / size];
    if (set.empty() || std::ranges::count(set, static_cast<int64_t>(i % size)) > 0) continue;
    in.q[i] = in.p[i] = value;
  }
  return in;
}

Sets sets_of(const Pairs& in, int64_t size) {
  Batch batch = random_batch(in.dtype, 1, in.vocabulary, 1);
  batch.targets.assign(static_cast<size_t>(in.rows), 0);
  return device_sets(batch, size);
}

TEST(SupportKlProgram, DivergencesAreThoseOfTheKeptLogits) {
  for (DType dtype : kDeviceTypes) {
    for (int64_t vocabulary : {2, 33, 2051}) {
      for (int64_t size : {1, 20, 600}) {
        Pairs in = pairs_test::random_pairs(dtype, 4, vocabulary, 3, 1);
        in.temperature = 0.8;
        const Sets sets = sets_of(in, size);
        const PairResult want = definition(with_others(in, sets, -1e30));
        for (bool in_place : {false, true}) {
          const PairResult got = run_pairs(with_others(in, sets, kNan), sets, in_place);
          expect_close(got, want, in);
          for (size_t i = 0; i < want.dq.size(); ++i) {
            const auto v = static_cast<int64_t>(i) % vocabulary;
            const auto& set = sets[i / static_cast<size_t>(vocabulary)];
            if (set.empty() || std::ranges::count(set, v) > 0) continue;
            ASSERT_EQ(std::abs(got.dq[i]) + std::abs(got.dp[i]), 0);
          }
        }
      }
    }
  }
}

TEST(SupportKlProgram, DivergencesOfUnknownIdsAreNanAndInactiveRowsAreNotRead) {
  Pairs in = pairs_test::random_pairs(DType::float32, 4, 100, 1, 1);
  Sets sets = sets_of(in, 5);
  sets[0].push_back(100);
  sets[1] = {-7};
  in.upstream[2] = {};
  const uint8_t active[] = {1, 0, 1, 1};
  std::fill_n(in.q.begin() + 100, 100, kNan);
  const PairResult got = run_pairs(in, sets, true, active);
  for (const Doubles& each : {got.kl, got.reverse_kl, got.entropy}) {
    EXPECT_TRUE(std::isnan(each[0]));
    EXPECT_EQ(each[1], 0);
    EXPECT_GT(each[2], 0);
    EXPECT_GT(each[3], 0);
  }
  for (size_t i = 0; i < 300; ++i) {
    const bool kept = std::ranges::count(sets[i / 100], static_cast<int64_t>(i % 100)) > 0;
    EXPECT_EQ(std::isnan(got.dq[i]), i < 100 && kept) << i;
    EXPECT_TRUE((i < 100 && kept) || got.dq[i] == 0) << i;
  }
}

TEST(SupportKlProgram, RealThreadsOfAPairHaveTheSameBits) {
  constexpr int kFew = 64;
  const Pairs in = pairs_test::random_pairs(DType::bfloat16, 2, 3001, 3, 1);
  const Sets sets = sets_of(in, 300);
  const auto run = [&](const auto& run_rows) {
    return run_pairs(in, sets, true, nullptr, run_rows);
  };
  const PairResult by_threads = run([](const auto& program) { ThreadTeam<kFew>::run(2, program); });
  const PairResult alone = run([](const auto& program) {
    for (int row = 0; row < 2; ++row) program(HostCluster<kFew>{}, row);
  });
  EXPECT_EQ(by_threads.dq, alone.dq);
  EXPECT_EQ(by_threads.dp, alone.dp);
}

}  // namespace
}  // namespace tether
