#include "rl/catalogue.h"

#include <gtest/gtest.h>

#include <filesystem>
#include <set>
#include <string>
#include <string_view>

#include "tests/error_message.h"

namespace tether {
namespace {

TEST(Catalogue, EveryFormulaIsKnownToTheFacesByType) {
  for (const CatalogueRow& row : kCatalogue) {
    const PolicyObjective objective = row.preset();
    bool known = false;
    for_each_surrogate(
        [&](auto formula) { known |= objective.surrogate.target<decltype(formula)>() != nullptr; });
    EXPECT_TRUE(known) << row.name;
  }
  for (const PreferenceRow& row : kPreferenceCatalogue) {
    const PreferenceObjective objective = row.preset();
    bool known = false;
    for_each_preference_formula(
        [&](auto formula) { known |= objective.loss.target<decltype(formula)>() != nullptr; });
    EXPECT_TRUE(known) << row.name;
  }
}

TEST(Catalogue, EveryPresetIsLegal) {
  for (const CatalogueRow& row : kCatalogue) {
    EXPECT_EQ(message([&] { check_objective("f", row.preset()); }), "no error") << row.name;
  }
  for (const PreferenceRow& row : kPreferenceCatalogue) {
    EXPECT_EQ(message([&] { check_objective("f", row.preset()); }), "no error") << row.name;
  }
}

// rl/policy/x.h has tests/rl/policy/x_test.cc.
void expect_cases_by_hand(std::string_view header) {
  const std::string stem(header.substr(0, header.rfind('.')));
  EXPECT_TRUE(std::filesystem::exists(TETHER_TESTS_DIR "/" + stem + "_test.cc")) << header;
}
TEST(Catalogue, EveryHeaderHasItsCasesByHand) {
  for (const CatalogueRow& row : kCatalogue) expect_cases_by_hand(row.header);
  for (const PreferenceRow& row : kPreferenceCatalogue) expect_cases_by_hand(row.header);
}

TEST(Catalogue, NamesAreUnique) {
  std::set<std::string_view> names;
  for (const CatalogueRow& row : kCatalogue) EXPECT_TRUE(names.insert(row.name).second) << row.name;
  for (const PreferenceRow& row : kPreferenceCatalogue) {
    EXPECT_TRUE(names.insert(row.name).second) << row.name;
  }
}

}  // namespace
}  // namespace tether
