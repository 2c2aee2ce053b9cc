#pragma once

namespace tether {

// What a policy objective sees of one token. All log-probabilities are natural logarithms [nats].
//
// The gradient flows through the Numbers; Constants have none. A formula returns the token's loss,
// to be minimised.
template <class Number, class Constant>
struct Token {
  Number logp;         // log pi_theta(token | prefix)
  Number log_ratio;    // logp - old_logp
  Number ratio;        // exp(log_ratio), saturated (core/number.h); the metrics share it
  Constant advantage;  // A
  Constant old_logp;   // under the policy at the start of the optimizer step
  Constant ref_logp;   // under the reference policy; 0 where the batch has none
};

}  // namespace tether
