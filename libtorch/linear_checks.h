#pragma once

#include <string>

#include "linear_sweep.h"
#include "linear_types.h"
#include "token_logps_types.h"

namespace tether::detail {

// Hidden states and head in one floating-point type, differentiably: that of autocast where it is
// on, as torch's own linear takes them; else the widest of theirs, so that nothing is rounded.
struct LinearOperands {
  at::Tensor hidden;
  LinearHead head;
};
LinearOperands in_one_type(const at::Tensor& hidden, const LinearHead& head);

// The inputs as [N, H], detached, with every rule of linear_token_logps checked; ids only on the
// CPU's side. Throws before anything is computed.
LinearInputs checked_linear(const std::string& function, const at::Tensor& hidden,
                            const LinearHead& head, const at::Tensor& targets,
                            const LinearOptions& options);

RowOptions row_options(const LinearOptions& options);
inline ChunkSize chunk_size(const LinearOptions& options) {
  return {options.chunk_bytes, options.rows_per_chunk};
}

// What goes with targets.
TokenLogpsOptions token_options(const LinearOptions& options);

}  // namespace tether::detail
