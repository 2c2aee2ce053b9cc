#pragma once

#include <string_view>

#include "../batch_weight.h"

namespace tether {

// Throws unless what the rule needs is given and its options are legal.
void check_needs(std::string_view function, const BatchWeightInputs<bool>& given,
                 const BatchWeight& rule);

// Writes the weight of every active token, and 1 in masked slots. In double, in one thread: ranks
// and quantiles need the batch as a whole. A number
// that is not finite, of those that the rule needs, makes every weight NaN.
//
// Throws Error before anything is written: an array that the rule needs and that is missing, an
// option out of range, a mask outside [0, 1].
void batch_weights(std::string_view function, const BatchWeightArrays& batch,
                   const BatchWeight& rule, const MutableArray& out);

}  // namespace tether
