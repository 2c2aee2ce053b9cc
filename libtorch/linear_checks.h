#pragma once

#include <string_view>

#include "linear_sweep.h"
#include "linear_types.h"
#include "token_logps_types.h"

namespace tether::detail {

// Throws unless tensors and options are what linear_token_logps takes, but for the ids. Inputs in
// one floating-point type, differentiably: that of autocast where it is on, as torch's own linear
// takes them; else the widest of theirs, so that nothing is rounded. Targets in int64, contiguous.
LinearInputs checked_linear(std::string_view function, const at::Tensor& hidden,
                            const LinearHead& head, const at::Tensor& targets,
                            const LinearOptions& options);

// IndexError unless every target is in [0, V) or ignored. Kernels for CUDA make a row with another
// one NaN: it would have to be waited for.
void check_targets(std::string_view function, const LinearInputs& inputs,
                   const LinearOptions& options);

// hidden [N, H] and targets [N], detached.
LinearInputs as_rows(const LinearInputs& inputs);

// linear_token_logps of inputs that are checked and in one type.
TokenLogps linear_token_logps(const LinearInputs& inputs, const LinearOptions& options);

}  // namespace tether::detail
