#pragma once

#include <array>
#include <cstddef>
#include <string_view>
#include <tuple>

#include "kl_form.h"

namespace tether {

// One form of the library: its name among the choices of an objective, its formula of
// d = log other - log sampled, who has it. What its mean, slope and score follow is in its labels.
template <class Form>
struct KlRow {
  std::string_view name;
  Form form;
  std::string_view formula;
  std::string_view paper;

  static constexpr KlLabels labels() { return detail::kl_labels_of<Form>(); }
};

// The only list of forms in the project: one line each.
inline constexpr std::tuple kKlCatalogue{
    KlRow{"k1", K1{}, "-d", "Schulman 2020, joschu.net/blog/kl-approx.html"},
    KlRow{"k2", K2{}, "d^2 / 2", "Schulman 2020, joschu.net/blog/kl-approx.html"},
    KlRow{"k3", K3{}, "e^d - 1 - d", "arXiv:2402.03300, eq. 4"},
    KlRow{"abs", KlAbs{}, "|d|", "verl, kl_penalty abs"},
};

// visit(row) for every form.
template <class Visit>
constexpr void for_each_kl_form(Visit visit) {
  std::apply([&](const auto&... row) { (visit(row), ...); }, kKlCatalogue);
}

inline constexpr auto kKlFormNames =
    std::apply([](const auto&... row) { return std::array{row.name...}; }, kKlCatalogue);

// A form as a choice among those names (core/options.h); a user's own is none of them.
inline void choose(KlForm& form, size_t index) {
  size_t each = 0;
  for_each_kl_form([&](const auto& row) {
    if (each++ == index) form = row.form;
  });
}
inline size_t chosen(const KlForm& form) {
  size_t each = 0, found = kKlFormNames.size();
  for_each_kl_form([&]<class Form>(const KlRow<Form>&) {
    if (form.type() == typeid(Form)) found = each;
    ++each;
  });
  return found;
}

}  // namespace tether
