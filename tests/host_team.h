#pragma once

#include <vector>

#include "core/team.h"

namespace tether {

// A team of threads on the host, one after the other, the last one first where `backwards`: no
// thread may need within a phase what another one does there.
template <int kTeamThreads>
struct HostTeam {
  static constexpr int kThreads = kTeamThreads;

  bool backwards = false;

  template <class State>
  struct Local {
    std::vector<State> states = std::vector<State>(kThreads);
  };

  template <class State, class Body>
  void each(Local<State>& local, Body body) const {
    for (int i = 0; i < kThreads; ++i) {
      const int thread = backwards ? kThreads - 1 - i : i;
      body(thread, local.states[static_cast<size_t>(thread)]);
    }
  }

  // The tree of DeviceTeam.
  template <class Op, class State, class Numbers>
  auto reduce(const Local<State>& local, Numbers numbers) const {
    using Values = decltype(numbers(local.states[0]));
    constexpr int kWarps = kThreads / kWarp;
    std::vector<Values> of_warps;
    for (int warp = 0; warp < kWarps; ++warp) {
      std::vector<Values> lanes;
      for (int lane = 0; lane < kWarp; ++lane) {
        lanes.push_back(numbers(local.states[static_cast<size_t>(warp * kWarp + lane)]));
      }
      of_warps.push_back(butterfly<Op>(lanes));
    }
    return butterfly<Op>(of_warps);
  }

 private:
  template <class Op, class T, int N>
  static Several<T, N> butterfly(std::vector<Several<T, N>> values) {
    for (size_t distance = values.size() / 2; distance > 0; distance /= 2) {
      const auto before = values;
      for (size_t lane = 0; lane < values.size(); ++lane) {
        for (int i = 0; i < N; ++i) {
          values[lane].each[i] = Op::of(before[lane].each[i], before[lane ^ distance].each[i]);
        }
      }
    }
    return values[0];
  }
};

}  // namespace tether
