#include "libtorch/generalized_advantage.h"

#include <ATen/ops/empty.h>

#include "libtorch/arrays.h"
#include "libtorch/executor.h"

namespace tether {

AdvantagesAndReturns generalized_advantage_estimation(const GaeBatch& given, const Gae& options) {
  const auto function = "generalized_advantage_estimation";
  return detail::with_public_errors([&] {
    const GaeBatch batch = detail::on_host(detail::checked(function, given));
    const auto like = [&] {
      return at::empty(batch.rewards.sizes(), at::dtype(batch.rewards.scalar_type()));
    };
    const AdvantagesAndReturns out{like(), like()};
    generalized_advantage_estimation(face::arrays_of(function, batch), options,
                                     face::mutable_token_array(out.advantages),
                                     face::mutable_token_array(out.returns), torch_executor());
    const at::Device device = given.rewards.device();
    return AdvantagesAndReturns{out.advantages.to(device), out.returns.to(device)};
  });
}

}  // namespace tether
