#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <string_view>

#include "support.h"

namespace tether::detail {

// That it is one, of the positions of `like`: targets, or logits with `of_logits`.
void check_support(std::string_view function, const Support& support, std::string_view name,
                   const at::Tensor& like, bool of_logits);
// IndexError for one that is not below the vocabulary.
void check_kept_ids(std::string_view function, const at::Tensor& ids, int64_t vocabulary);

}  // namespace tether::detail
