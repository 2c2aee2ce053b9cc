#pragma once

#include "../core/parallel.h"

namespace tether {

// The library's loops on torch's own threads (at::set_num_threads).
Executor torch_executor();

}  // namespace tether
