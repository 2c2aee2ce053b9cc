#include "logits/pair_kl_program.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <random>
#include <string>
#include <vector>

#include "logits/held_pair_program.h"
#include "tests/device_types.h"
#include "tests/host_team.h"
#include "tests/logits/pairs_reference.h"
#include "tests/thread_team.h"

// The programs of the CUDA kernels on teams of host threads, in the shapes that pair_kl.cu
// launches, beside the definition and the CPU kernel.

namespace tether {
namespace {

using namespace pairs_test;

struct Floats {
  std::vector<float> kl, reverse_kl, entropy;

  explicit Floats(int64_t rows) : kl(static_cast<size_t>(rows), 7), reverse_kl(kl), entropy(kl) {}
  explicit Floats(const std::vector<LogitsKl>& of) : Floats(static_cast<int64_t>(of.size())) {
    for (size_t i = 0; i < of.size(); ++i) {
      kl[i] = static_cast<float>(of[i].kl);
      reverse_kl[i] = static_cast<float>(of[i].reverse_kl);
      entropy[i] = static_cast<float>(of[i].entropy);
    }
  }
  cuda::PairKlArrays<float> out() { return {kl.data(), reverse_kl.data(), entropy.data()}; }
  cuda::PairKlArrays<const float> in() const {
    return {kl.data(), reverse_kl.data(), entropy.data()};
  }
};

Floats run_values(const ConstLogits& q, const ConstLogits& p, double temperature,
                  const uint8_t* active = nullptr, bool backwards = false) {
  Floats out(q.rows);
  const auto in = cuda::pair_parameters(q, p, temperature, active);
  with_device_type(q.dtype, [&]<class Stored>(Stored) {
    const HostTeam<cuda::kPairThreads> team{backwards};
    for (int64_t row = 0; row < q.rows; ++row) {
      cuda::pair_kl_program<Stored>(team, in, row, out.out());
    }
  });
  return out;
}

void run_held(const ConstLogits& q, const ConstLogits& p, double temperature,
              const Floats& upstream, const cuda::PairKlArrays<float>& values,
              const MutableLogits& dq, const MutableLogits& dp, const uint8_t* active = nullptr,
              bool backwards = false, bool clusters = true) {
  const auto in = cuda::pair_parameters(q, p, temperature, active);
  with_device_type(q.dtype, [&]<class Stored>(Stored) {
    const HostCluster<cuda::kHeldPairThreads<Stored>> team{
        .blocks = cuda::blocks_of_held_pair<Stored>(q.vocabulary, clusters),
        .backwards = backwards};
    for (int64_t row = 0; row < q.rows; ++row) {
      cuda::held_pair_program<Stored>(team, in, row, upstream.in(), values, dq, dp);
    }
  });
}

Doubles doubles(const std::vector<float>& of) { return {of.begin(), of.end()}; }

// Values and gradients by the held program, values also by the other one.
PairResult run_program(const Pairs& in, bool in_place = false, bool backwards = false,
                       bool clusters = true) {
  Memory q(in.dtype, in.q), p(in.dtype, in.p);
  Memory dq(in.dtype, in.rows * in.vocabulary), dp = dq;
  const Floats alone = run_values(view(in, q), view(in, p), in.temperature, nullptr, backwards);
  Floats values(in.rows);
  Memory& q_out = in_place ? q : dq;
  Memory& p_out = in_place ? p : dp;
  run_held(view(in, q), view(in, p), in.temperature, Floats(in.upstream), values.out(),
           out_view(in, q_out), out_view(in, p_out), nullptr, backwards, clusters);
  for (auto each : {&Floats::kl, &Floats::reverse_kl, &Floats::entropy}) {
    for (size_t row = 0; row < (values.*each).size(); ++row) {
      const float one = (alone.*each)[row], other = (values.*each)[row];
      const bool same = one == other || (std::isnan(one) && std::isnan(other)) ||
                        std::min(one, other) > 1e32f;  // gaps beyond this count as less
      EXPECT_TRUE(same || std::abs(one - other) <= 1e-5 * (1 + std::abs(one)))
          << one << " and " << other;
    }
  }
  return {doubles(values.kl), doubles(values.reverse_kl), doubles(values.entropy),
          q_out.values(in.rows * in.vocabulary), p_out.values(in.rows * in.vocabulary)};
}

TEST(PairKlProgram, MatchesTheDefinition) {
  for (DType dtype : kDeviceTypes) {
    for (int64_t vocabulary : {1, 2, 7, 8, 31, 33, 2048, 5003}) {
      for (double gap : {0.05, 1.0, 6.0}) {
        Pairs in = random_pairs(dtype, 3, vocabulary, 4, gap);
        in.temperature = 0.8;
        expect_close(run_program(in, vocabulary == 31, gap == 1), definition(in), in);
      }
    }
  }
}

// Held by a cluster, held in part, and read again.
TEST(PairKlProgram, MatchesTheDefinitionAtTheVocabularyOfAModel) {
  for (DType dtype : kDeviceTypes) {
    Pairs in = random_pairs(dtype, 1, 151936, 3, 0.5);
    for (size_t i = 0; i < in.q.size(); i += 5) in.q[i] = in.p[i] = -infinity;
    const PairResult want = definition(in);
    expect_close(run_program(in, true), want, in);
    expect_close(run_program(in, false, true, /*clusters=*/false), want, in);
  }
}

TEST(PairKlProgram, ReferencesMoveWhereTheyMust) {
  for (DType dtype : kDeviceTypes) {
    const Pairs in = ramped_pairs(dtype, 9000);
    expect_close(run_program(in), definition(in), in);
  }
}

TEST(PairKlProgram, ConfidentColumnsKeepTheDigitsOfTheirGradients) {
  for (DType dtype : kDeviceTypes) {
    for (int64_t vocabulary : {2, 33, 2048}) {
      for (int64_t column : {int64_t{0}, vocabulary / 2, vocabulary - 1}) {
        for (double distance : {1.0, 12.0, 20.0, 30.0}) {
          for (const LogitsKl& upstream : {LogitsKl{1, 0, 0}, {0, 1, 0}, {0, 0, 1}, {2, -1, 3}}) {
            for (bool both : {true, false}) {
              Pairs in = random_pairs(dtype, 1, vocabulary, 0.5, 0.5);
              const double above = distance + std::log(static_cast<double>(vocabulary));
              const auto at = static_cast<size_t>(column);
              in.q[at] = above;
              in.p[both ? at : (at + 1) % static_cast<size_t>(vocabulary)] = above;
              in.upstream = {upstream};
              const PairResult got = run_program(in, both), want = definition(in);
              for (auto side : {&PairResult::dq, &PairResult::dp}) {
                if (!both && side == &PairResult::dp) continue;
                long double others = 0;
                double mass = 0;
                for (size_t v = 0; v < static_cast<size_t>(vocabulary); ++v) {
                  if (v == at) continue;
                  others += (want.*side)[v];
                  mass += std::exp(in.q[v] - above) + std::exp(in.p[v] - above);
                }
                const double bound = 64 * 0x1p-23 * mass * (2 + above) +
                                     1.01 * rounding(dtype, static_cast<double>(others));
                ASSERT_NEAR((got.*side)[at], static_cast<double>(-others), bound)
                    << name(dtype, vocabulary) << ", column " << column << ", distance " << distance
                    << ", both " << both;
              }
            }
          }
        }
      }
    }
  }
}

TEST(PairKlProgram, EqualRowsHaveNone) {
  for (DType dtype : kDeviceTypes) {
    Pairs in = random_pairs(dtype, 2, 3000, 5, 0);
    in.p = in.q;
    const PairResult got = run_program(in);
    for (size_t row = 0; row < 2; ++row) {
      EXPECT_EQ(got.kl[row], 0);
      EXPECT_EQ(got.reverse_kl[row], 0);
    }
  }
}

// What the CPU kernel says of columns that are not there, and of numbers that are none.
void expect_like_the_cpu(const Pairs& in) {
  const PairResult got = run_program(in), want = run(in);
  const auto near = [](const Doubles& a, const Doubles& b, double bound, const char* what) {
    for (size_t i = 0; i < b.size(); ++i) {
      const bool same = a[i] == b[i] || (std::isnan(a[i]) && std::isnan(b[i]));
      ASSERT_TRUE(same || std::abs(a[i] - b[i]) <= bound * (1 + std::abs(b[i])))
          << what << " " << i << ": " << a[i] << ", " << b[i];
    }
  };
  near(got.kl, want.kl, 1e-5, "kl");
  near(got.reverse_kl, want.reverse_kl, 1e-5, "reverse");
  near(got.entropy, want.entropy, 1e-5, "entropy");
  const double bound = in.dtype == DType::float32 ? 1e-5 : 1e-2;
  near(got.dq, want.dq, bound, "dq");
  near(got.dp, want.dp, bound, "dp");
}

TEST(PairKlProgram, AbsentColumnsAndBrokenNumbersAreThoseOfTheCpuKernel) {
  for (DType dtype : kDeviceTypes) {
    for (double mine : {-infinity, kNan, infinity, -60.0, -80.0}) {
      for (double other : {-infinity, 0.0, -60.0, -80.0, -1e4}) {
        for (size_t count : {1u, 290u, 300u}) {
          for (bool swapped : {false, true}) {
            Pairs in = random_pairs(dtype, 2, 300, 1, 1);
            std::fill_n(in.q.begin(), count, mine);
            std::fill_n(in.p.begin(), count, other);
            in.q[299] = in.p[299] = -infinity;
            if (swapped) std::swap(in.q, in.p);
            SCOPED_TRACE(name(dtype, 300) + " " + std::to_string(mine) + " beside " +
                         std::to_string(other) + " " + std::to_string(count));
            in.upstream = {{1, 1, 1}, {1, 1, 1}};
            expect_like_the_cpu(in);
            in.upstream[0] = swapped ? LogitsKl{1, 0, 1} : LogitsKl{0, 1, 1};
            expect_like_the_cpu(in);
          }
        }
      }
    }
  }
}

// Whatever one thread sees of a row may not be there in it.
TEST(PairKlProgram, MaskedBlocksAgainstVeryUnlikelyOnes) {
  for (DType dtype : kDeviceTypes) {
    const Pairs without = random_pairs(dtype, 1, 3000, 2, 1);
    const PairResult want = run_program(without);
    for (double unlikely : {-80.0, -90.0}) {
      Pairs in = without;
      in.vocabulary = 9000;
      in.q.insert(in.q.begin(), 6000, -infinity);
      in.p.insert(in.p.begin(), 6000, unlikely);
      for (bool swapped : {false, true}) {
        const PairResult got = run_program(in);
        EXPECT_NEAR(got.kl[0], swapped ? want.reverse_kl[0] : want.kl[0], 4e-6);
        EXPECT_NEAR(got.reverse_kl[0], swapped ? want.kl[0] : want.reverse_kl[0], 4e-6);
        std::swap(in.q, in.p);
      }
    }
  }
}

TEST(PairKlProgram, FiniteLogitsOfAnySizeGiveNoNaN) {
  std::mt19937 generator(8);
  for (DType dtype : kDeviceTypes) {
    const double most = dtype == DType::float16 ? 65504 : 0x1.FEp127;
    for (double power = 1.0 / 16; power <= 1; power += 1.0 / 16) {
      const double size = std::pow(most, power);
      for (double temperature : {1e-6, 1.0, 1e6}) {
        for (double upstream : {1e-30, 1.0, 1e30, 0x1.FEp127}) {
          Pairs in{.dtype = dtype,
                   .rows = 4,
                   .vocabulary = 40,
                   .q = Doubles(160),
                   .p = Doubles(160),
                   .temperature = temperature};
          in.upstream = {{upstream, 0, 0}, {0, upstream, 0}, {0, 0, upstream}, {}};
          in.upstream[3] = {upstream, -upstream, upstream};
          for (Doubles* row : {&in.q, &in.p}) {
            for (double& x : *row) x = size * (static_cast<double>(generator() % 3) - 1);
          }
          const PairResult got = run_program(in);
          for (size_t row = 0; row < 4; ++row) {
            ASSERT_GE(got.kl[row], 0);
            ASSERT_GE(got.reverse_kl[row], 0);
            ASSERT_GE(got.entropy[row], 0);
          }
          for (double each : got.dq) ASSERT_FALSE(std::isnan(each)) << size << " " << upstream;
          for (double each : got.dp) ASSERT_FALSE(std::isnan(each)) << size << " " << upstream;
        }
      }
    }
  }
}

TEST(PairKlProgram, NoGradientIsSubnormalAndAnAbsentColumnHasNone) {
  for (double upstream : {1e-6, 1.0, 1e6, static_cast<double>(infinity)}) {
    Pairs in = random_pairs(DType::float32, 2, 3000, 18, 0.3);
    for (size_t i = 0; i < in.q.size(); i += 7) in.q[i] = in.p[i] = -infinity;
    in.upstream = {{upstream, 0, 0}, {-upstream, upstream, upstream}};
    const PairResult got = run_program(in);
    for (const Doubles& gradient : {got.dq, got.dp}) {
      for (size_t i = 0; i < gradient.size(); ++i) {
        const double each = gradient[i];
        ASSERT_TRUE(std::isnan(each) || each == 0 || std::abs(each) >= 0x1p-126) << each;
        ASSERT_TRUE(each == 0 || i % 7 != 0) << each;
      }
      EXPECT_GT(std::count(gradient.begin(), gradient.end(), 0.0), 10);
    }
    const bool finite =
        std::ranges::all_of(got.dq, [](double each) { return std::isfinite(each); });
    EXPECT_EQ(finite, std::isfinite(upstream));
  }
}

TEST(PairKlProgram, AnInfiniteDivergenceHasNoGradientWhereThereIsAProbability) {
  expect_no_slopes_of_infinite([](const Pairs& in) { return run_program(in); }, DType::float32);
}

// Offsets, strides and one gradient alone; memory beside the rows stays as it is.
TEST(PairKlProgram, AnyPlaceAndOneGradientAlone) {
  constexpr int64_t kVocabulary = 2051, kRow = 2 * kVocabulary + 9;
  for (DType dtype : kDeviceTypes) {
    Pairs in = random_pairs(dtype, 2, kVocabulary, 3, 1);
    const PairResult want = run_program(in);
    for (int64_t stride : {1, 2}) {
      for (int64_t offset : {0, 3, 8}) {
        for (bool of_q : {true, false}) {
          Memory q(dtype, Doubles(2 * kRow + 40, 768)), p = q, out = q;
          const auto at = [&](Memory& memory, int64_t shift) {
            return memory.as<char>() + shift * bytes_of(dtype);
          };
          const ConstLogits q_view{at(q, offset), dtype, 2, kVocabulary, kRow, stride};
          const ConstLogits p_view{at(p, 5), dtype, 2, kVocabulary, kRow, stride};
          for (size_t i = 0; i < in.q.size(); ++i) {
            const auto row = static_cast<int64_t>(i) / kVocabulary;
            const int64_t place = row * kRow + static_cast<int64_t>(i) % kVocabulary * stride;
            q.set(static_cast<size_t>(place + offset), in.q[i]);
            p.set(static_cast<size_t>(place + 5), in.p[i]);
          }
          const MutableLogits to{at(out, offset), dtype, 2, kVocabulary, kRow, stride};
          run_held(q_view, p_view, 1, Floats(in.upstream), {}, of_q ? to : MutableLogits{},
                   of_q ? MutableLogits{} : to);
          const Doubles& expected = of_q ? want.dq : want.dp;
          int64_t guards = 0;
          for (size_t i = 0; i < static_cast<size_t>(2 * kRow + 40); ++i) {
            guards += out.get(i) == 768 ? 1 : 0;
          }
          EXPECT_EQ(guards, 2 * kRow + 40 - 2 * kVocabulary);
          for (size_t i = 0; i < in.q.size(); ++i) {
            const auto row = static_cast<int64_t>(i) / kVocabulary;
            const int64_t place = row * kRow + static_cast<int64_t>(i) % kVocabulary * stride;
            ASSERT_NEAR(out.get(static_cast<size_t>(place + offset)), expected[i],
                        2e-6 + 2.1 * rounding(dtype, expected[i]));
          }
        }
      }
    }
  }
}

TEST(PairKlProgram, RowsThatAreNotWantedAreNotRead) {
  Pairs in = random_pairs(DType::float32, 3, 100, 1, 1);
  std::fill_n(in.q.begin(), 200, kNan);
  in.upstream[1] = {};
  Memory q(in.dtype, in.q), p(in.dtype, in.p), dq(in.dtype, Doubles(300, 7)), dp = dq;
  const uint8_t active[] = {0, 1, 1};
  const Floats alone = run_values(view(in, q), view(in, p), 1, active);
  EXPECT_EQ(alone.kl[0] + alone.reverse_kl[0] + alone.entropy[0], 0);
  EXPECT_TRUE(std::isnan(alone.kl[1]));
  run_held(view(in, q), view(in, p), 1, Floats(in.upstream), {}, out_view(in, dq), out_view(in, dp),
           active);
  for (size_t i = 0; i < 200; ++i) EXPECT_EQ(std::abs(dq.get(i)) + std::abs(dp.get(i)), 0);
  EXPECT_NE(dq.get(250), 0);
  // Where values are wanted, an active row has them, and a gradient of 0.
  Floats values(3);
  in.q[150] = in.q[0] = 0;
  run_held(view(in, q), view(in, p), 1, Floats(in.upstream), values.out(), out_view(in, dq),
           out_view(in, dp), active);
  EXPECT_EQ(values.kl[0], 0);
  EXPECT_TRUE(std::isnan(values.kl[1]));
  EXPECT_GT(values.kl[2], 0);
  for (size_t i = 0; i < 200; ++i) EXPECT_EQ(dq.get(i), 0);
}

// Each row is a block of real threads, that wait where the device's do.
TEST(PairKlProgram, RealThreadsHaveTheSameBits) {
  using Team = ThreadTeam<cuda::kHeldPairThreads<BFloat16>>;
  const Pairs in = random_pairs(DType::bfloat16, 2, 3001, 3, 1);
  const PairResult want = run_program(in);
  Memory q(in.dtype, in.q), p(in.dtype, in.p);
  const auto parameters = cuda::pair_parameters(view(in, q), view(in, p), 1, nullptr);
  const Floats upstream(in.upstream);
  Team::run(2, [&](const Team& team, int row) {
    cuda::held_pair_program<BFloat16>(team, parameters, row, upstream.in(), {}, out_view(in, q),
                                      out_view(in, p));
  });
  EXPECT_EQ(q.values(2 * 3001), want.dq);
  EXPECT_EQ(p.values(2 * 3001), want.dp);
}

}  // namespace
}  // namespace tether
