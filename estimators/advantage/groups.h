#pragma once

#include <cstdint>
#include <string_view>

#include "group_rule.h"

namespace tether {

// Throws unless what the rule reads is given.
void check_reads(std::string_view function, const GroupInputs<bool>& given, const GroupRule& rule);

// Throws unless so many rewards are whole groups.
void check_sizes(std::string_view function, bool has_ids, int64_t group_size, int64_t count);

// Any rule over the groups of raw memory; errors begin with `function`.
struct GroupArrays {
  const double* rewards = nullptr;  // [count]
  const int64_t* group_ids = nullptr;
  const double* lengths = nullptr;
  int64_t group_size = 0;  // without ids: `count` is a multiple of it
  int64_t count = 0;
};
void advantages_of_groups(std::string_view function, const GroupArrays& batch,
                          const GroupRule& rule, double* advantages);

}  // namespace tether
