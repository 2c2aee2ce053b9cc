#pragma once

// The LibTorch face of the library.

#include "libtorch/categorical_kl.h"
#include "libtorch/discounted_returns.h"
#include "libtorch/estimate_kl.h"
#include "libtorch/generalized_advantage.h"
#include "libtorch/group_advantage.h"
#include "libtorch/linear_loss.h"
#include "libtorch/linear_token_logps.h"
#include "libtorch/policy_loss.h"
#include "libtorch/preference_loss.h"
#include "libtorch/response_targets.h"
#include "libtorch/token_logps.h"
#include "libtorch/top_k_kl.h"
#include "libtorch/value_loss.h"
