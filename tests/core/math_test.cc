#include "core/math.h"

#include <gtest/gtest.h>

#include <array>
#include <fstream>
#include <nlohmann/json.hpp>
#include <string>
#include <string_view>
#include <type_traits>
#include <vector>

#include "tests/core/math_reference.h"

namespace tether::math_test {
namespace {

template <class Function>
class Math : public testing::Test {};
using Each = testing::Types<Exp, Expm1, Log, Log1p, Sigmoid, LogSigmoid, Log1mexp, Expm1Minus>;

struct FunctionName {
  template <class Function>
  static std::string GetName(int) {
    return Function::kName;
  }
};
TYPED_TEST_SUITE(Math, Each, FunctionName);

const nlohmann::json& golden() {
  static const auto json =
      nlohmann::json::parse(std::ifstream(TETHER_TESTS_DIR "/core/math_golden.json"));
  return json;
}

// Every 1021st bit pattern; all of them in math_exhaustive_long_test.cc.
TYPED_TEST(Math, FloatIsWithinItsBound) {
  constexpr std::uint32_t kStride = 1021;
  double worst = 0;
  float worst_at = 0;
  for (std::uint64_t pattern = 0; pattern < (1ull << 32); pattern += kStride) {
    const float x = std::bit_cast<float>(static_cast<std::uint32_t>(pattern));
    const float result = TypeParam::ours(x);
    const double exact = TypeParam::template reference<DoubleMath>(double(x));
    ASSERT_TRUE((in_range<TypeParam>(result, exact))) << "at " << x << ": " << result;
    const double error = ulp_error(result, exact);
    if (error > worst) worst = error, worst_at = x;
  }
  EXPECT_LE(worst, TypeParam::template kUlp<float>) << "ulp, at " << worst_at;
  EXPECT_GE(worst, 0.5) << "no function is rounded correctly at all of these: nothing was measured";
}

// Golden values by mpmath. long double holds the exact value of a row: its 64 bits are 1/2048 ulp.
TYPED_TEST(Math, DoubleIsWithinItsBound) {
  ASSERT_GE(golden().at(TypeParam::kName).size(), 200u);
  for (const auto& row : golden().at(TypeParam::kName)) {
    const double x = row[0], high = row[1], low = row[2];
    const double result = TypeParam::ours(x);
    const long double exact = static_cast<long double>(high) + low;
    EXPECT_LE(ulp_error(result, exact), TypeParam::template kUlp<double>)
        << std::hexfloat << "at " << x << ": " << result << ", not " << high;
    EXPECT_TRUE((in_range<TypeParam>(result, exact))) << "at " << x << ": " << result;
  }
}

template <class T>
class MathSpecial : public testing::Test {};
using FloatingPoint = testing::Types<float, double>;
TYPED_TEST_SUITE(MathSpecial, FloatingPoint);

template <class T>
bool same(T a, T b) {
  return (a != a && b != b) ||
         std::bit_cast<math::detail::Bits<T>>(a) == std::bit_cast<math::detail::Bits<T>>(b);
}

TYPED_TEST(MathSpecial, ValuesAreExact) {
  using T = TypeParam;
  using Limits = std::numeric_limits<T>;
  constexpr T inf = Limits::infinity(), nan = Limits::quiet_NaN(), tiny = Limits::denorm_min(),
              huge = Limits::max(), zero = 0, one = 1;
  struct Row {
    const char* call;
    T result, expected;
  };
#define TETHER_ROW(function, x, expected) \
  Row { #function "(" #x ")", math::function(T(x)), expected }
  const std::vector<Row> rows{
      TETHER_ROW(exp, -inf, zero),
      TETHER_ROW(exp, -huge, zero),
      TETHER_ROW(exp, -0.0, one),
      TETHER_ROW(exp, tiny, one),
      TETHER_ROW(exp, huge, inf),
      TETHER_ROW(exp, inf, inf),
      TETHER_ROW(exp, nan, nan),
      TETHER_ROW(expm1, -inf, -one),
      TETHER_ROW(expm1, -huge, -one),
      TETHER_ROW(expm1, -0.0, -zero),
      TETHER_ROW(expm1, 0.0, zero),
      TETHER_ROW(expm1, -tiny, -tiny),
      TETHER_ROW(expm1, huge, inf),
      TETHER_ROW(expm1, inf, inf),
      TETHER_ROW(expm1, nan, nan),
      TETHER_ROW(log, -inf, nan),
      TETHER_ROW(log, -tiny, nan),
      TETHER_ROW(log, -0.0, -inf),
      TETHER_ROW(log, 0.0, -inf),
      TETHER_ROW(log, 1.0, zero),
      TETHER_ROW(log, inf, inf),
      TETHER_ROW(log, nan, nan),
      TETHER_ROW(log1p, -inf, nan),
      TETHER_ROW(log1p, -1.5, nan),
      TETHER_ROW(log1p, -1.0, -inf),
      TETHER_ROW(log1p, -0.0, -zero),
      TETHER_ROW(log1p, 0.0, zero),
      TETHER_ROW(log1p, -tiny, -tiny),
      TETHER_ROW(log1p, inf, inf),
      TETHER_ROW(log1p, nan, nan),
      TETHER_ROW(sigmoid, -inf, zero),
      TETHER_ROW(sigmoid, -huge, zero),
      TETHER_ROW(sigmoid, 0.0, one / 2),
      TETHER_ROW(sigmoid, huge, one),
      TETHER_ROW(sigmoid, inf, one),
      TETHER_ROW(sigmoid, nan, nan),
      TETHER_ROW(log_sigmoid, -inf, -inf),
      TETHER_ROW(log_sigmoid, -huge, -huge),
      TETHER_ROW(log_sigmoid, huge, zero),
      TETHER_ROW(log_sigmoid, inf, zero),
      TETHER_ROW(log_sigmoid, nan, nan),
      TETHER_ROW(log1mexp, -inf, -zero),
      TETHER_ROW(log1mexp, -huge, -zero),
      TETHER_ROW(log1mexp, -0.0, -inf),
      TETHER_ROW(log1mexp, 0.0, -inf),
      TETHER_ROW(log1mexp, tiny, nan),
      TETHER_ROW(log1mexp, inf, nan),
      TETHER_ROW(log1mexp, nan, nan),
      TETHER_ROW(expm1_minus, -inf, inf),
      TETHER_ROW(expm1_minus, -huge, huge),
      TETHER_ROW(expm1_minus, -tiny, zero),
      TETHER_ROW(expm1_minus, -0.0, zero),
      TETHER_ROW(expm1_minus, 0.0, zero),
      TETHER_ROW(expm1_minus, huge, inf),
      TETHER_ROW(expm1_minus, inf, inf),
      TETHER_ROW(expm1_minus, nan, nan),
  };
#undef TETHER_ROW
  for (const Row& row : rows) {
    EXPECT_TRUE(same(row.result, row.expected))
        << row.call << " = " << row.result << ", not " << row.expected;
  }
}

TYPED_TEST(MathSpecial, BoundsOfTheArgumentAreAClamp) {
  using T = TypeParam;
  for (const T x : std::array<T, 7>{-100, -60, -3, 0, 5, 60, 100}) {
    const T bounded = std::clamp(x, T(-60), T(60)), below = std::min(x, T(60));
    EXPECT_EQ(math::exp(x, T(-60), T(60)), math::exp(bounded));
    EXPECT_EQ(math::expm1(x, T(60)), math::expm1(below));
    EXPECT_EQ(math::expm1_minus(x, T(60)), math::expm1_minus(below));
  }
  EXPECT_TRUE(std::isnan(math::exp(std::numeric_limits<T>::quiet_NaN(), T(-60), T(60))));
}

// A product fused into the sum after it: the build has no -ffp-contract=off and its bits are free.
bool contracts_products() {
  const volatile float input = 0x1.001p0f;  // its square is a tie, 2^-24 from a float
  const float x = input;
  return x * x - 0x1.002p0f != 0;
}

// 2^16 bit patterns spread evenly over all of them, and 2^14 arguments in +-18.
template <class T>
std::vector<T> fixed_grid() {
  using Bits = math::detail::Bits<T>;
  std::vector<T> grid;
  for (std::uint64_t i = 0; i < (1u << 16); ++i) {
    const std::uint64_t pattern = i * 0x9e3779b97f4a7c15u;
    grid.push_back(std::bit_cast<T>(static_cast<Bits>(pattern >> (64 - 8 * sizeof(T)))));
  }
  for (int i = -(1 << 13); i < (1 << 13); ++i) grid.push_back(T(i) * T(0x1.2345p-9));
  return grid;
}

// FNV-1a over the bits of the results; a NaN's sign and payload are free.
template <class Function, class T>
std::uint64_t hash_of_results() {
  using Bits = math::detail::Bits<T>;
  std::vector<T> results = fixed_grid<T>();
  for (T& x : results) x = Function::ours(x);
  std::uint64_t hash = 0xcbf29ce484222325u;
  for (const T y : results) {
    hash ^= y != y ? 1 : std::bit_cast<Bits>(y);
    hash *= 0x100000001b3u;
  }
  return hash;
}

struct Hashes {
  std::string_view name;
  std::uint64_t of_float, of_double;
};

// The same in every build: this file is also built for x86-64, -v3 and -v4. A change of a function
// changes its hashes; the new ones are in the failure message.
constexpr Hashes kHashes[] = {
    {"exp", 0xd5440e6c6cb1dd93u, 0x80edcf97f53bf3a3u},
    {"expm1", 0xd2f0a917e5c3445cu, 0xd1398d86338a4066u},
    {"log", 0x2def7386ec905e43u, 0x7426c43a8f1bae76u},
    {"log1p", 0x4dbc5c6fe076ae4eu, 0xdcb6d6b850896d1eu},
    {"sigmoid", 0x9fcfc4bcb45ba7e6u, 0xf6584ee9888b0fb1u},
    {"log_sigmoid", 0xfc1a64f8bf00b571u, 0x4a03ff8bd7aa78b7u},
    {"log1mexp", 0x32b7e68096e59d91u, 0xccfd8025b09dee99u},
    {"expm1_minus", 0xd0a4f2ba1aa30821u, 0xb228bc870c5dd034u},
};

TYPED_TEST(Math, BitsAreTheSameOnEveryInstructionSet) {
  if (contracts_products()) GTEST_SKIP() << "built with fused products";
  const auto* stored = std::find_if(std::begin(kHashes), std::end(kHashes),
                                    [](const Hashes& h) { return h.name == TypeParam::kName; });
  ASSERT_NE(stored, std::end(kHashes));
  EXPECT_EQ((hash_of_results<TypeParam, float>()), stored->of_float);
  EXPECT_EQ((hash_of_results<TypeParam, double>()), stored->of_double);
}

}  // namespace
}  // namespace tether::math_test
