#pragma once

#include <cstddef>
#include <iterator>
#include <vector>

#include "core/team.h"

namespace tether {

// A scan by the tree of DeviceTeam.
template <class Value>
struct Scanned {
  std::vector<Value> behind;
  Value all;
};
template <class Op, class Value>
Scanned<Value> scanned_back(std::vector<Value> own) {
  for (size_t distance = 1; distance < kWarp; distance *= 2) {
    const std::vector<Value> before = own;
    for (size_t i = 0; i < own.size(); ++i) {
      if (i % kWarp + distance < kWarp) own[i] = Op::of(before[i], before[i + distance]);
    }
  }
  Scanned<Value> out{own, Op::none()};
  for (size_t warp = own.size(); warp > 0; warp -= kWarp) {
    for (size_t i = warp - kWarp; i < warp; ++i) {
      out.behind[i] = i + 1 < warp ? Op::of(own[i + 1], out.all) : out.all;
    }
    out.all = Op::of(own[warp - kWarp], out.all);
  }
  return out;
}

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
    return reduced<Op>(local.states.data(), numbers);
  }
  template <class Op, class State, class Numbers>
  static auto reduced(const State* states, Numbers numbers) {
    using Values = decltype(numbers(states[0]));
    constexpr int kWarps = kThreads / kWarp;
    std::vector<Values> of_warps;
    for (int warp = 0; warp < kWarps; ++warp) {
      std::vector<Values> lanes;
      for (int lane = 0; lane < kWarp; ++lane)
        lanes.push_back(numbers(states[warp * kWarp + lane]));
      of_warps.push_back(butterfly<Op>(lanes));
    }
    return butterfly<Op>(of_warps);
  }

  template <class Op, class State, class Part, class Use>
  auto scan_back(Local<State>& local, Part part, Use use) const {
    std::vector<decltype(part(local.states[0]))> parts;
    for (const State& state : local.states) parts.push_back(part(state));
    const auto scanned = scanned_back<Op>(parts);
    each(local, [&](int thread, State& state) {
      use(state, scanned.behind[static_cast<size_t>(thread)]);
    });
    return scanned.all;
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

// A cluster of teams (core/cluster.h) on the host.
template <int kBlockThreads>
struct HostCluster {
  int blocks = 1;
  bool backwards = false;

  template <class State>
  struct Local {
    std::vector<State> states = {};  // as soon as a team is known
  };

  int threads() const { return blocks * kBlockThreads; }

  template <class State, class Body>
  void each(Local<State>& local, Body body) const {
    local.states.resize(static_cast<size_t>(threads()));
    for (int i = 0; i < threads(); ++i) {
      const int thread = backwards ? threads() - 1 - i : i;
      body(thread, local.states[static_cast<size_t>(thread)]);
    }
  }

  // The tree of DeviceCluster.
  template <class Op, class State, class Numbers>
  auto reduce(const Local<State>& local, Numbers numbers) const {
    const auto of_block = [&](int block) {
      return HostTeam<kBlockThreads>::template reduced<Op>(
          local.states.data() + block * kBlockThreads, numbers);
    };
    auto values = of_block(0);
    for (int block = 1; block < blocks; ++block) {
      const auto more = of_block(block);
      for (size_t i = 0; i < std::size(values.each); ++i) {
        values.each[i] = Op::of(values.each[i], more.each[i]);
      }
    }
    return values;
  }
};

// program(team, i) for every i of `teams`, in one thread.
template <int threads>
struct HostRun {
  HostTeam<threads> team = {};

  template <class Program>
  void operator()(int64_t teams, Program program) const {
    for (int64_t i = 0; i < teams; ++i) program(team, team.backwards ? teams - 1 - i : i);
  }
};

}  // namespace tether
