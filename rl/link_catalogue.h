#pragma once

#include <array>
#include <cstddef>
#include <string_view>
#include <tuple>

#include "link.h"
#include "preference/alphapo.h"
#include "preference/divergence_links.h"

namespace tether {

// One link of the library: its name among the choices of an objective.
template <class Formula>
struct LinkRow {
  std::string_view name;
  Formula link;
  std::string_view formula;
  std::string_view paper;
  std::string_view header;
  std::string_view agreement;  // as ObjectiveRow has it (rl/catalogue.h)
};

// The only list of links in the project: one line each.
inline constexpr std::tuple kLinkCatalogue{
    LinkRow{"reverse_kl", ReverseKl{}, "S", "arXiv:2305.18290", "rl/preference/divergence_links.h",
            "mpmath; TRL reverse_kl"},
    LinkRow{"forward_kl", ForwardKl{}, "-e^-S", "arXiv:2309.16240, table 1",
            "rl/preference/divergence_links.h", "mpmath; TRL forward_kl"},
    LinkRow{"js", JensenShannon{}, "log sigmoid(S)", "arXiv:2309.16240, table 1",
            "rl/preference/divergence_links.h", "mpmath; TRL js_divergence"},
    LinkRow{"alphapo", AlphaPo{}, "(1 - e^(-alpha S)) / alpha", "arXiv:2501.03884",
            "rl/preference/alphapo.h", "mpmath"},
};

// visit(row) for every link.
template <class Visit>
constexpr void for_each_link(Visit visit) {
  std::apply([&](const auto&... row) { (visit(row), ...); }, kLinkCatalogue);
}

inline constexpr auto kLinkNames =
    std::apply([](const auto&... row) { return std::array{row.name...}; }, kLinkCatalogue);

// A link as a choice among those names (core/options.h); a user's own is none of them.
inline void choose(Link& link, size_t index) {
  size_t each = 0;
  for_each_link([&](const auto& row) {
    if (each++ == index) link = row.link;
  });
}
inline size_t chosen(const Link& link) {
  size_t each = 0, found = kLinkNames.size();
  for_each_link([&]<class Formula>(const LinkRow<Formula>&) {
    if (link.type() == typeid(Formula)) found = each;
    ++each;
  });
  return found;
}

}  // namespace tether
