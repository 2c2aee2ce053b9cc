#include "core/batch.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <vector>

#include "core/half.h"
#include "core/parallel.h"
#include "core/sum.h"

namespace tether {
namespace {

TEST(Half, EveryFloat16IsExactThereAndBack) {
  for (uint32_t bits = 0; bits < 65536; ++bits) {
    const uint16_t half = static_cast<uint16_t>(bits);
    const float value = from_float16(half);
    const int exponent = (half >> 10) & 31, mantissa = half & 1023;
    if (exponent == 31 && mantissa != 0) {
      EXPECT_TRUE(std::isnan(value));
      EXPECT_TRUE(std::isnan(from_float16(to_float16(value))));
      continue;
    }
    float expected = exponent == 0    ? std::ldexp(float(mantissa), -24)
                     : exponent == 31 ? std::numeric_limits<float>::infinity()
                                      : std::ldexp(float(mantissa + 1024), exponent - 25);
    if (half & 0x8000) expected = -expected;
    ASSERT_EQ(value, expected) << bits;
    ASSERT_EQ(to_float16(value), half) << bits;
  }
}

TEST(Half, Float16RoundsToNearestEven) {
  for (uint16_t half = 0; half < 0x7BFF; ++half) {  // consecutive non-negative numbers
    const float low = from_float16(half), high = from_float16(static_cast<uint16_t>(half + 1));
    const float middle = 0.5f * (low + high);
    ASSERT_EQ(to_float16(middle), half % 2 == 0 ? half : half + 1) << half;
    ASSERT_EQ(to_float16(std::nextafter(middle, high)), half + 1);
    ASSERT_EQ(to_float16(std::nextafter(middle, low)), half);
    ASSERT_EQ(to_float16(-middle), 0x8000 | (half % 2 == 0 ? half : half + 1));
  }
  EXPECT_EQ(to_float16(65519.9f), 0x7BFF);
  EXPECT_EQ(to_float16(65520.0f), 0x7C00);
  EXPECT_EQ(to_float16(1e-30f), 0);
}

TEST(Half, BFloat16RoundsToNearestEven) {
  for (uint32_t bits = 0; bits < 0x7F7F; ++bits) {
    const uint16_t half = static_cast<uint16_t>(bits);
    const float low = from_bfloat16(half), high = from_bfloat16(static_cast<uint16_t>(half + 1));
    ASSERT_EQ(to_bfloat16(low), half);
    const float middle = low + 0.5f * (high - low);
    ASSERT_EQ(to_bfloat16(middle), half % 2 == 0 ? half : half + 1) << half;
    ASSERT_EQ(to_bfloat16(std::nextafter(middle, low)), half);
  }
  EXPECT_TRUE(std::isnan(from_bfloat16(to_bfloat16(std::nanf("")))));
  EXPECT_EQ(to_bfloat16(3.4e38f), 0x7F80);
}

TEST(Batch, LoadsAnyStrideAndNeverLooksAtWeightZero) {
  const float nan = std::nanf("");
  const std::vector<float> data = {1, nan, 2, nan, 3, nan};  // columns 0, 1, 2 at stride 2
  const RowLayout layout{.rows = 1, .columns = 3};
  const ConstArray array{data.data(), DType::float32, 6, 2};
  const double weights[kLanes] = {1, 0, 1};
  double out[kLanes];
  load_block<double>(layout, array, 0, 0, 3, weights, out);
  EXPECT_EQ(std::vector<double>(out, out + kLanes),
            (std::vector<double>{1, 0, 3, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0}));
}

TEST(Batch, PackedRowsStartAtTheirOffsets) {
  const std::vector<double> data = {1, 2, 3, 4, 5};
  const int32_t offsets[] = {0, 2, 2, 5};
  const RowLayout layout{.rows = 3, .offsets32 = offsets};
  const ConstArray tokens{data.data(), DType::float64, 0, 1};
  EXPECT_EQ(layout.length(1), 0);
  EXPECT_EQ(layout.length(2), 3);
  double out[kLanes];
  load_block<double>(layout, tokens, 2, 1, 2, nullptr, out);
  EXPECT_EQ(out[0], 4);
  EXPECT_EQ(out[1], 5);
  const ConstArray per_row{data.data(), DType::float64, 1, 0, true};
  load_block<double>(layout, per_row, 2, 0, 3, nullptr, out);
  EXPECT_EQ(out[2], 3);
}

TEST(Batch, StoresRoundOnceAndTouchNothingElse) {
  std::vector<uint16_t> out(6, 0xABCD);
  const RowLayout layout{.rows = 1, .columns = 3};
  const float values[kLanes] = {1.00390625f, -2, 1e-3f};
  store_block<float>(layout, {out.data(), DType::bfloat16, 6, 2}, 0, 0, 3, values);
  EXPECT_EQ(out, (std::vector<uint16_t>{0x3F80, 0xABCD, 0xC000, 0xABCD, 0x3A83, 0xABCD}));
}

TEST(Chunks, CoverEveryRowOnceWhateverTheShape) {
  for (int64_t rows : {0, 1, 2, 63, 64, 65, 1000}) {
    for (int64_t columns : {0, 1, 100, 100000}) {
      const Chunks chunks = Chunks::of(rows, rows * columns);
      EXPECT_LE(chunks.count, kMaxChunks);
      int64_t next = 0;
      for (int64_t i = 0; i < chunks.count; ++i) {
        EXPECT_EQ(chunks.begin(i), next);
        EXPECT_GT(chunks.end(i), next);
        next = chunks.end(i);
      }
      EXPECT_EQ(next, rows);
    }
  }
}

TEST(LaneSum, AddsEveryLane) {
  LaneSum sum;
  for (int i = 0; i < kLanes; ++i) sum.lane[i] = i;
  EXPECT_EQ(sum.total(), 120);
}

}  // namespace
}  // namespace tether
