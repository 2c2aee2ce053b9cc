#pragma once

#include <string_view>
#include <vector>

#include "cuda_stream.h"

namespace tether::cuda {

// A few numbers that the host knows, at most three, to out[] on the device: by a kernel that takes
// them as its arguments, since a copy from the host's memory would be waited for.
void set_numbers(std::string_view function, const std::vector<double>& numbers, double* out,
                 Stream stream);

}  // namespace tether::cuda
