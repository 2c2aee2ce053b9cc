#pragma once

#include <cstddef>
#include <tuple>

#include "../../core/catalogue.h"
#include "kl_form.h"

namespace tether {

// The only list of forms in the project: one line each, as formulas of d = log other - log sampled.
// What their mean, slope and score follow is in their labels.
inline constexpr std::tuple kKlCatalogue{
    FormulaRow{"k1", K1{}, "-d", "Schulman 2020, joschu.net/blog/kl-approx.html",
               "estimators/kl/forms.h", "mpmath; verl k1"},
    FormulaRow{"k2", K2{}, "d^2 / 2", "Schulman 2020, joschu.net/blog/kl-approx.html",
               "estimators/kl/forms.h", "mpmath; verl k2"},
    FormulaRow{"k3", K3{}, "e^d - 1 - d", "arXiv:2402.03300, eq. 4", "estimators/kl/forms.h",
               "mpmath; verl k3"},
    FormulaRow{"low_var_kl", LowVarKl{}, "min(e^d - 1 - d, 10)", "verl, kl_penalty low_var_kl",
               "estimators/kl/forms.h", "mpmath; verl low_var_kl"},
    FormulaRow{"abs", KlAbs{}, "|d|", "verl, kl_penalty abs", "estimators/kl/forms.h",
               "mpmath; verl abs"},
};

// visit(row) for every form.
template <class Visit>
constexpr void for_each_kl_form(Visit visit) {
  for_each_row(kKlCatalogue, visit);
}

inline constexpr auto kKlFormNames = names_of_rows(kKlCatalogue);

// A form as a choice among those names; a user's own is none of them.
inline void choose(KlForm& form, size_t index) { choose_row(form, index, kKlCatalogue); }
inline size_t chosen(const KlForm& form) { return chosen_row(form, kKlCatalogue); }

}  // namespace tether
