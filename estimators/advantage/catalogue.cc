#include "estimators/advantage/catalogue.h"

namespace tether {

void choose(Recursion& recursion, size_t index) {
  choose_row(recursion, index, kRecursionCatalogue);
}
void choose(GroupRule& rule, size_t index) { choose_row(rule, index, kGroupCatalogue); }
size_t chosen(const Recursion& recursion) { return chosen_row(recursion, kRecursionCatalogue); }
size_t chosen(const GroupRule& rule) { return chosen_row(rule, kGroupCatalogue); }

Recursion first_recursion() { return std::get<0>(kRecursionCatalogue).defaults; }
GroupRule first_group_rule() { return std::get<0>(kGroupCatalogue).defaults; }

}  // namespace tether
