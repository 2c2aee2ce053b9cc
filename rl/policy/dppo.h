#pragma once

#include "cispo.h"
#include "trust_region.h"

namespace tether::presets {

// DPPO: the truncated importance-weighted policy gradient, of the tokens within a trust region that
// is stated in probabilities and not in ratios.
//
//   loss = -M sg(min(ratio, ratio_high)) A logp,   M by total variation or KL (trust_region.h)
//
// arXiv:2602.04879, eq. 12. verl cuts the ratio at its clip_ratio_c, 3 unless set.
inline PolicyObjective dppo_tv(const TvMask& mask = {}, double ratio_high = 20) {
  return weighed(cispo({.ratio_low = 0, .ratio_high = ratio_high}), mask);
}
inline PolicyObjective dppo_kl(const KlMask& mask = {}, double ratio_high = 20) {
  return weighed(cispo({.ratio_low = 0, .ratio_high = ratio_high}), mask);
}

}  // namespace tether::presets
