#pragma once

// A header of the consumer under a name that tether has too.
constexpr bool kOwnCheck = true;
