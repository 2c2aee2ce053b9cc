#include "core/type_table.h"

#include <gtest/gtest.h>

#include <atomic>
#include <thread>
#include <typeinfo>
#include <utility>
#include <vector>

namespace tether {
namespace {

template <int>
struct Tag {};

// visit(type, number) for each of 64 types.
template <class Visit>
void for_each_tag(Visit visit) {
  [&]<int... number>(std::integer_sequence<int, number...>) {
    (visit(std::type_index(typeid(Tag<number>)), number), ...);
  }(std::make_integer_sequence<int, 64>());
}

TEST(TypeTable, HoldsTheLastValueOfAType) {
  TypeTable<int> table;
  EXPECT_EQ(table.find(typeid(Tag<0>)), std::nullopt);
  table.add(typeid(Tag<0>), 1);
  table.add(typeid(Tag<1>), 2);
  table.add(typeid(Tag<0>), 3);
  EXPECT_EQ(table.find(typeid(Tag<0>)), 3);
  EXPECT_EQ(table.find(typeid(Tag<1>)), 2);
  EXPECT_EQ(table.find(typeid(Tag<2>)), std::nullopt);
}

TEST(TypeTable, ThreadsAddAndFind) {
  TypeTable<int> table;
  std::atomic<int> wrong = 0;
  std::vector<std::thread> threads;
  for (int i = 0; i < 4; ++i) {
    threads.emplace_back([&] {
      for_each_tag([&](std::type_index type, int number) {
        wrong += table.find(type).value_or(number) != number;
        table.add(type, number);
        wrong += table.find(type) != number;
      });
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(wrong, 0);
}

}  // namespace
}  // namespace tether
