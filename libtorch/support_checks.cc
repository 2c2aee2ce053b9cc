#include "libtorch/support_checks.h"

#include <ATen/TensorOperators.h>

#include <string>

#include "libtorch/arrays.h"
#include "libtorch/logits_rows.h"

namespace tether {
namespace {

// Whether its tensors fit together.
bool is_made(const Support& support) {
  const auto& [ids, position, whole, added] = support;
  for (const at::Tensor& each : {position, whole, added}) {
    if (!each.defined() || each.sizes() != position.sizes() || each.device() != ids.device()) {
      return false;
    }
  }
  return ids.dim() == position.dim() + 1 &&
         ids.sizes().slice(0, position.dim()) == position.sizes() &&
         ids.scalar_type() == at::kLong && position.scalar_type() == at::kLong &&
         whole.scalar_type() == at::kBool && added.scalar_type() == at::kBool;
}

}  // namespace

namespace detail {

void check_support(std::string_view function, const Support& support, std::string_view name,
                   const at::Tensor& like, bool of_logits) {
  const std::string where = named(function, "support");
  require(support.ids.defined(), [&] { return where + " must be given, got none"; });
  require(is_made(support),
          [&] { return where + " must be as tether::support makes it, got another"; });
  const at::IntArrayRef positions = of_logits ? positions_of(like) : like.sizes();
  require(support.position.sizes() == positions, [&] {
    return where + " must be of " + std::string(name) + " " + shape_text(like.sizes()) + ", got " +
           shape_text(support.position.sizes());
  });
  require(support.ids.device() == like.device(), [&] {
    return where + " must be on " + like.device().str() + " like " + std::string(name) + ", got " +
           support.ids.device().str();
  });
}

void check_kept_ids(std::string_view function, const at::Tensor& ids, int64_t vocabulary) {
  const int64_t largest = ids.numel() > 0 ? ids.max().item<int64_t>() : -1;
  if (largest < vocabulary) return;
  C10_THROW_ERROR(IndexError, named(function, "support") + " must have ids below " +
                                  text(vocabulary) + ", got " + text(largest));
}

}  // namespace detail
}  // namespace tether
