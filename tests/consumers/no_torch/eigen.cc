// DPO of one pair of answers, the advantages of a trajectory, and log-probabilities over the ids
// that a sampler kept, on Eigen arrays.
#include <face/eigen.h>
#include <face/eigen_estimators.h>
#include <face/eigen_support.h>

#include <iostream>

int main() {
  Eigen::ArrayXXd logps(2, 2), ref_logps(2, 2);
  logps << -1, -2, -1.5, -3;
  ref_logps << -1.2, -2.1, -1.4, -2.8;
  const Eigen::ArrayXXd mask = Eigen::ArrayXXd::Ones(2, 2);
  const auto loss = tether::eigen::preference_loss(
      {.logps = logps, .ref_logps = ref_logps, .response_mask = mask}, tether::presets::dpo());
  std::cout << "loss " << loss.loss << "\n" << loss.dlogps << "\n";

  Eigen::ArrayXXd rewards(1, 3), values(1, 3), active = Eigen::ArrayXXd::Ones(1, 3);
  rewards << 0, 0, 1;
  values << 0.5, 0.25, 0.5;
  const auto [advantages, returns] = tether::eigen::generalized_advantage_estimation(
      rewards, values, active, {.gamma = 1, .lambda = 0.5});
  std::cout << "advantages " << advantages << "\n";

  Eigen::ArrayXXd logits(1, 4);
  logits << 1, 0, 2, 9;
  Eigen::Array<int64_t, 1, 3> top_k{2, 0, -1};
  const Eigen::Array<int64_t, 1, 1> targets{0};
  const Eigen::ArrayXd dlogps = Eigen::ArrayXd::Ones(1);
  const tether::eigen::KeptIds kept{.ids = top_k};  // [N, K], padded with -1
  const auto out = tether::eigen::token_logps(logits, targets, kept);
  const Eigen::ArrayXXd dlogits =
      tether::eigen::token_logps_gradient(logits, targets, kept, out, dlogps);
  std::cout << "logp " << out.logps << "\n" << dlogits << "\n";
}
