#include <ATen/TensorOperators.h>
#include <ATen/ops/where.h>

#include "libtorch/arrays.h"
#include "libtorch/categorical_kl.h"
#include "libtorch/logits_rows.h"
#include "libtorch/support.h"
#include "libtorch/support_checks.h"
#include "logits/inputs.h"

namespace tether {
namespace detail {

CategoricalKl categorical_kl_any_device(const at::Tensor& q_logits, const at::Tensor& p_logits,
                                        const CategoricalKlOptions& options,
                                        const Support& support) {
  const auto of = [&](const at::Tensor& q, const at::Tensor& p, const at::Tensor& mask) {
    return categorical_kl_any_device(q, p, {options.temperature, options.mask.logical_and(mask)});
  };
  const CategoricalKl kept =
      of(support.gather(q_logits), support.gather(p_logits), support.whole.logical_not());
  if (!support.whole.any().item<bool>()) return kept;
  const CategoricalKl whole = of(q_logits, p_logits, support.whole);
  const auto chosen = [&](const at::Tensor CategoricalKl::* member) {
    return at::where(support.whole, whole.*member, kept.*member);
  };
  return {chosen(&CategoricalKl::kl), chosen(&CategoricalKl::reverse_kl),
          chosen(&CategoricalKl::entropies)};
}

}  // namespace detail

CategoricalKl categorical_kl(const at::Tensor& q_logits, const at::Tensor& p_logits,
                             const CategoricalKlOptions& given, const Support& support) {
  return detail::with_public_errors([&] {
    constexpr const char* kName = "categorical_kl";
    face::check_arguments(kName, CategoricalKlInputs<at::Tensor>{q_logits, p_logits, given.mask});
    check_fields(kName, given);
    detail::check_support(kName, support, "q_logits", q_logits, true);
    const at::Tensor known = (support.position >= 0) | support.whole;
    CategoricalKlOptions options = given;
    options.mask = given.mask.defined() ? known & given.mask : known;
    Support kept = support;
    kept.ids = support.ids.masked_fill((~options.mask).unsqueeze(-1), -1);
    const bool has_kernels = detail::row_kernels(q_logits) != nullptr;
    if (!has_kernels) detail::check_kept_ids(kName, kept.ids, q_logits.size(-1));
    if (q_logits.is_cpu() || has_kernels) {
      return detail::categorical_kl(q_logits, p_logits, options, kept.ids.contiguous());
    }
    return detail::categorical_kl_any_device(q_logits, p_logits, options, kept);
  });
}

}  // namespace tether
