#pragma once

#include <cstddef>
#include <tuple>

#include "../core/catalogue.h"
#include "link.h"
#include "preference/alphapo.h"
#include "preference/divergence_links.h"
#include "preference/log_odds.h"

namespace tether {

// The only list of links in the project: one line each.
inline constexpr std::tuple kLinkCatalogue{
    FormulaRow{"reverse_kl", ReverseKl{}, "S", "arXiv:2305.18290",
               "rl/preference/divergence_links.h", "mpmath; TRL reverse_kl"},
    FormulaRow{"forward_kl", ForwardKl{}, "-e^-S", "arXiv:2309.16240, table 1",
               "rl/preference/divergence_links.h", "mpmath; TRL forward_kl"},
    FormulaRow{"js", JensenShannon{}, "log sigmoid(S)", "arXiv:2309.16240, table 1",
               "rl/preference/divergence_links.h", "mpmath; TRL js_divergence"},
    FormulaRow{"alphapo", AlphaPo{}, "(1 - e^(-alpha S)) / alpha", "arXiv:2501.03884",
               "rl/preference/alphapo.h", "mpmath; TRL CPO alpha"},
    FormulaRow{"log_odds", LogOdds{}, "S - log(1 - e^S)", "arXiv:2403.07691, eq. 4",
               "rl/preference/log_odds.h", "mpmath; TRL orpo, float32; Liger orpo, float32"},
};

// visit(row) for every link.
template <class Visit>
constexpr void for_each_link(Visit visit) {
  for_each_row(kLinkCatalogue, visit);
}

inline constexpr auto kLinkNames = names_of_rows(kLinkCatalogue);

// A link as a choice among those names; a user's own is none of them.
inline void choose(Link& link, size_t index) { choose_row(link, index, kLinkCatalogue); }
inline size_t chosen(const Link& link) { return chosen_row(link, kLinkCatalogue); }

}  // namespace tether
