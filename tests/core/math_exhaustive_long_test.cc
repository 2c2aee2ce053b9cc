// core/math.h over every float, and in double over a million random arguments.

#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cstdio>
#include <random>
#include <thread>
#include <vector>

#include "core/math.h"
#include "tests/core/math_reference.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#include <quadmath.h>
#define TETHER_HAS_QUAD 1
#endif

namespace tether::math_test {
namespace {

struct Worst {
  double ulp = 0, at = 0;
  std::uint64_t out_of_range = 0;

  void add(double error, double x) {
    if (error > ulp) *this = {error, x, out_of_range};
  }
};

// One thread's share of the 2^32 patterns: every kThreads-th block. Most results are the exact
// value rounded: their error is at most 0.5 and is not computed.
constexpr int kThreads = 2;

template <class Function>
Worst sweep(int thread) {
  constexpr int kBlock = 4096;
  std::array<float, kBlock> x, result;
  Worst worst;
  for (std::uint64_t block = thread * kBlock; block < (1ull << 32); block += kThreads * kBlock) {
    for (int i = 0; i < kBlock; ++i) {
      x[i] = std::bit_cast<float>(static_cast<std::uint32_t>(block + i));
    }
    for (int i = 0; i < kBlock; ++i) result[i] = Function::ours(x[i]);
    for (int i = 0; i < kBlock; ++i) {
      const double exact = Function::template reference<DoubleMath>(double(x[i]));
      worst.out_of_range += !in_range<Function>(result[i], exact);
      if (result[i] != static_cast<float>(exact)) worst.add(ulp_error(result[i], exact), x[i]);
    }
  }
  return worst;
}

template <class Function>
class MathLong : public testing::Test {};
using Each = testing::Types<Exp, Expm1, Log, Log1p, Sigmoid, LogSigmoid, Log1mexp, Expm1Minus>;

struct FunctionName {
  template <class Function>
  static std::string GetName(int) {
    return Function::kName;
  }
};
TYPED_TEST_SUITE(MathLong, Each, FunctionName);

TYPED_TEST(MathLong, EveryFloatIsWithinItsBound) {
  std::array<Worst, kThreads> parts;
  std::vector<std::thread> threads;
  for (int i = 0; i < kThreads; ++i) {
    threads.emplace_back([&, i] { parts[i] = sweep<TypeParam>(i); });
  }
  for (std::thread& thread : threads) thread.join();
  const Worst worst = std::max(parts[0], parts[1], [](auto& a, auto& b) { return a.ulp < b.ulp; });
  std::printf("%-11s float  %.4f ulp at %a\n", TypeParam::kName, worst.ulp, worst.at);
  EXPECT_LE(worst.ulp, TypeParam::template kUlp<float>) << "ulp, at " << worst.at;
  EXPECT_EQ(parts[0].out_of_range + parts[1].out_of_range, 0u);
}

#ifdef TETHER_HAS_QUAD
struct QuadMath {
  using Number = __float128;
  static constexpr int kSeriesTerms = 24;  // 0.25^24 / 26! < 2^-113
  static Number exp(Number x) { return expq(x); }
  static Number expm1(Number x) { return expm1q(x); }
  static Number log(Number x) { return logq(x); }
  static Number log1p(Number x) { return log1pq(x); }
};

// Half uniform in +-40, a quarter of any size down to 2^-64, a quarter any bits at all.
double random_argument(int i, std::mt19937_64& random) {
  using Uniform = std::uniform_real_distribution<double>;
  if (i % 2 == 0) return Uniform(-40, 40)(random);
  if (i % 4 == 1) return std::bit_cast<double>(random());
  const double size = std::exp2(Uniform(-64, 9.5)(random));
  return random() % 2 == 0 ? size : -size;
}

TYPED_TEST(MathLong, MillionRandomDoublesAreWithinTheirBound) {
  std::mt19937_64 random(20260101);
  Worst worst;
  for (int i = 0; i < 1'000'000; ++i) {
    const double x = random_argument(i, random);
    const double result = TypeParam::ours(x);
    const __float128 exact = TypeParam::template reference<QuadMath>(__float128(x));
    worst.out_of_range += !in_range<TypeParam>(result, exact);
    worst.add(ulp_error(result, exact), x);
  }
  std::printf("%-11s double %.4f ulp at %a\n", TypeParam::kName, worst.ulp, worst.at);
  EXPECT_LE(worst.ulp, TypeParam::template kUlp<double>) << "ulp, at " << worst.at;
  EXPECT_EQ(worst.out_of_range, 0u);
}
#endif

}  // namespace
}  // namespace tether::math_test
