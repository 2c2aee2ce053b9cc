#include <algorithm>
#include <cmath>

#include "testing/properties.h"

namespace tether::testing {
namespace {

void add(Observed& sum, const Observed& part, double share = 1) {
  sum.gradient.resize(std::max(sum.gradient.size(), part.gradient.size()));
  sum.loss += share * part.loss;
  for (size_t i = 0; i < part.gradient.size(); ++i) sum.gradient[i] += share * part.gradient[i];
}

// Some items as a batch of their own, with the step's denominators; the gradient in its old place.
Observed part_of(const Probe& probe, const Case& batch, const Indices& items,
                 const Normalizer& step) {
  Observed out = probe(gathered(batch, items, all(batch.columns)), {.normalizer = step});
  out.gradient = returned(batch, items, all(batch.columns), out.gradient);
  return out;
}

Indices range(int64_t first, int64_t last) {
  Indices out;
  for (int64_t item = first; item < last; ++item) out.push_back(item);
  return out;
}

// Every way to cut the items into runs: bit i of `cuts` cuts after item i.
Failure check_split(const Probe& probe, const Case& batch) {
  const Normalizer step = probe.counts(batch);
  const Observed whole = probe(batch), magnitude = probe.magnitude(batch);
  if (Failure failure = probe.close("with the counts of this batch given",
                                    probe(batch, {.normalizer = step}), whole, magnitude)) {
    return failure;
  }
  std::map<std::pair<int64_t, int64_t>, Observed> parts;
  const auto part = [&](int64_t first, int64_t last) -> const Observed& {
    const auto [found, fresh] = parts.try_emplace({first, last});
    if (fresh) found->second = part_of(probe, batch, range(first, last), step);
    return found->second;
  };
  const int64_t places = std::min<int64_t>(std::max<int64_t>(batch.items() - 1, 0), 6);
  for (int64_t cuts = 0; cuts < int64_t{1} << places; ++cuts) {
    Observed sum;
    std::string sizes;
    int64_t first = 0;
    for (int64_t item = 0; item < batch.items(); ++item) {
      const bool cut = item < places && ((cuts >> item) & 1);
      if (!cut && item + 1 < batch.items()) continue;
      add(sum, part(first, item + 1));
      sizes += (sizes.empty() ? "" : " + ") + std::to_string(item + 1 - first);
      first = item + 1;
    }
    const std::string what = "micro-batches of " + sizes + " rows with the counts of all";
    if (Failure failure = probe.close(what, sum, whole, magnitude)) return failure;
  }
  return {};
}

// Ranks of a data-parallel step: each multiplies by their number, and the gradients are averaged.
Failure check_ranks(const Probe& probe, const Case& batch) {
  const Observed whole = probe(batch), magnitude = probe.magnitude(batch);
  for (int64_t ranks : {2, 3}) {
    Normalizer step = probe.counts(batch);
    step.world_size = static_cast<double>(ranks);
    Observed mean = part_of(probe, batch, {kPadding}, step);  // the last rank has no token
    mean.loss /= static_cast<double>(ranks);
    for (int64_t rank = 0; rank < ranks - 1; ++rank) {
      Indices items;
      for (int64_t item = rank; item < batch.items(); item += ranks - 1) items.push_back(item);
      add(mean, part_of(probe, batch, items, step), 1 / static_cast<double>(ranks));
    }
    const std::string what = std::to_string(ranks) + " ranks, one of them without a token";
    if (Failure failure = probe.close(what, mean, whole, magnitude)) return failure;
  }
  return {};
}

Failure check_empty(const Probe& probe, const Case& batch) {
  Case masked = batch;
  std::fill(masked.response_mask.begin(), masked.response_mask.end(), 0);
  struct Named {
    const char* name;
    Case batch;
    Normalizer step;
  };
  const Normalizer others{.policy = 10, .kl = 10, .sequences = 2};
  for (const Named& each : {Named{"nothing active", masked, {}},
                            Named{"no rows", gathered(batch, {}, all(batch.columns)), {}},
                            Named{"no columns", gathered(batch, all(batch.items()), {}), {}},
                            Named{"nothing active here, 10 tokens elsewhere", masked,
                                  probe.traits.takes_normalizer ? others : Normalizer{}}}) {
    const Observed got = probe(each.batch, {.normalizer = each.step});
    if (got.loss != 0) return std::string(each.name) + ": loss " + changed(0, got.loss);
    for (double gradient : got.gradient) {
      if (gradient != 0) return std::string(each.name) + ": gradient " + changed(0, gradient);
    }
  }
  return {};
}

// Every token twice at half its weight; the rows keep their counts.
Failure check_fractional_mask(const Probe& probe, const Case& batch) {
  Indices twice;
  for (int64_t column = 0; column < batch.columns; ++column) {
    twice.insert(twice.end(), {column, column});
  }
  Case doubled = gathered(batch, all(batch.items()), twice);
  for (double& weight : doubled.response_mask) weight /= 2;
  Observed got = probe(doubled);
  got.gradient = returned(batch, all(batch.items()), twice, got.gradient);
  return probe.close("every token twice, at half its weight", got, probe(batch),
                     probe.magnitude(batch));
}

Failure check_counts(const Probe& probe, const Case& batch) {
  const Normalizer got = probe.counts(batch), want = counts_of(batch);
  const auto check = [](const char* name, const std::optional<double>& counted,
                        double expected) -> Failure {
    if (counted && std::fabs(*counted - expected) <= 1e-6 * expected) return {};
    return std::string(name) + (counted ? " " + changed(expected, *counted) : " is missing");
  };
  if (Failure failure = check("policy", got.policy, *want.policy)) return failure;
  if (Failure failure = check("kl", got.kl, *want.kl)) return failure;
  return check("sequences", got.sequences, *want.sequences);
}

std::string_view needs_normalizer(const Subject& subject) {
  return subject.traits.takes_normalizer ? "" : "the loss takes no Normalizer";
}
std::string_view needs_weights(const Subject& subject) {
  return subject.traits.takes_fractional_mask ? "" : "the loss takes no weights between 0 and 1";
}
std::string_view needs_counts(const Subject& subject) {
  if (subject.traits.takes_tokens_out) return "weights may take a token out";
  return subject.counts ? "" : "no counts given";
}

constexpr Property kProperties[] = {
    {"split",
     "Any split into micro-batches, with the counts of the step, gives the loss and gradient of "
     "one",
     Batches::small, needs_normalizer, check_split},
    {"ranks",
     "Any split over ranks, times world_size and averaged, gives the loss and gradient of one",
     Batches::small, needs_normalizer, check_ranks},
    {"counts", "The counts are the active tokens and rows", Batches::small, needs_counts,
     check_counts},
    {"empty", "Without an active token the loss is 0 and so is its gradient", Batches::small, never,
     check_empty},
    {"fractional_mask", "Two copies of half weight are one of weight 1", Batches::small,
     needs_weights, check_fractional_mask},
};

}  // namespace

std::span<const Property> aggregation_properties() { return kProperties; }

}  // namespace tether::testing
