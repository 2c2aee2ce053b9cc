#pragma once

// The LibTorch face of the library.

#include "advantage.h"
#include "batch_weights.h"
#include "categorical_kl.h"
#include "kl_report.h"
#include "linear_loss.h"
#include "linear_token_logps.h"
#include "policy_loss.h"
#include "preference_loss.h"
#include "response_targets.h"
#include "support.h"
#include "token_logps.h"
#include "top_k_kl.h"
#include "value_loss.h"
