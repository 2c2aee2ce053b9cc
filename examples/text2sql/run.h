#pragma once

#include "examples/text2sql/options.h"

namespace text2sql {

// The whole demonstration: SFT, reinforcement learning, the control, the report. Returns the exit
// code of the program: 0, or 130 after Ctrl-C, when a checkpoint was written.
// Throws std::exception with one line for what the user can mend.
int run(const Options& options);

}  // namespace text2sql
