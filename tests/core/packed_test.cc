#include "core/packed.h"

#include <gtest/gtest.h>

#include "core/check.h"
#include "tests/error_message.h"

namespace tether {
namespace {

// As a device would, which the host runs of programs stand for.
TEST(Packed, AnAccessThatIsNotAlignedIsAnError) {
  alignas(16) float memory[12] = {1, 2, 3, 4, 5, 6, 7, 8};
  Packed<float>::at(memory + 4).store(memory);
  EXPECT_EQ(memory[3], 8);
  const std::string wanted = "a vector must be aligned to its 16 bytes";
  EXPECT_EQ(message([&] { Packed<float>::at(memory + 1); }), wanted);
  EXPECT_EQ(message([&] { Packed<float>{}.store(memory + 2); }), wanted);
  EXPECT_EQ(memory[2], 7);
}

}  // namespace
}  // namespace tether
