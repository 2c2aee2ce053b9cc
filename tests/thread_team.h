#pragma once

#include <barrier>
#include <cstddef>
#include <thread>
#include <type_traits>
#include <vector>

#include "core/team.h"
#include "tests/host_team.h"

namespace tether {

// A team of real threads, each with its own run through the program as on a device, that wait for
// one another only where DeviceTeam does: ThreadSanitizer sees what a program lacks.
template <int kTeamThreads>
class ThreadTeam {
 public:
  static constexpr int kThreads = kTeamThreads;
  static constexpr int threads() { return kThreads; }  // as a cluster of one block has it

  template <class State>
  struct Local {
    State state;
  };

  // program(team) in every thread of every team of `teams`, all at once.
  template <class Program>
  static void run(int teams, Program program) {
    std::vector<Shared> shared(static_cast<size_t>(teams));
    std::vector<std::thread> threads;
    for (int i = 0; i < teams * kThreads; ++i) {
      threads.emplace_back([&, i] {
        program(ThreadTeam(i % kThreads, shared[static_cast<size_t>(i / kThreads)]), i / kThreads);
      });
    }
    for (std::thread& each : threads) each.join();
  }

  template <class State, class Body>
  void each(Local<State>& local, Body body) const {
    body(thread_, local.state);
  }

  template <class Op, class State, class Numbers>
  auto reduce(const Local<State>& local, Numbers numbers) const {
    using Values = decltype(numbers(local.state));
    static_assert(sizeof(Values) <= sizeof(Slot) && std::is_trivially_copyable_v<Values>);
    const auto slot = [&](int thread) {
      return reinterpret_cast<Values*>(shared_->slots[thread].bytes);
    };
    shared_->barrier.arrive_and_wait();  // the last call's have been read
    *slot(thread_) = numbers(local.state);
    shared_->barrier.arrive_and_wait();
    Values lanes[kThreads];
    for (int i = 0; i < kThreads; ++i) lanes[i] = *slot(i);
    for (int warp = 0; warp < kThreads; warp += kWarp) butterfly<Op>(lanes + warp, kWarp);
    for (int i = 0; i < kThreads / kWarp; ++i) lanes[i] = lanes[i * kWarp];
    butterfly<Op>(lanes, kThreads / kWarp);
    return lanes[0];
  }

  template <class Op, class State, class Part, class Use>
  auto scan_back(Local<State>& local, Part part, Use use) const {
    using Value = decltype(part(local.state));
    static_assert(sizeof(Value) <= sizeof(Slot) && std::is_trivially_copyable_v<Value>);
    const auto slot = [&](int thread) {
      return reinterpret_cast<Value*>(shared_->slots[thread].bytes);
    };
    shared_->barrier.arrive_and_wait();  // the last call's have been read
    *slot(thread_) = part(local.state);
    shared_->barrier.arrive_and_wait();
    std::vector<Value> parts;
    for (int i = 0; i < kThreads; ++i) parts.push_back(*slot(i));
    const auto scanned = scanned_back<Op>(parts);
    use(local.state, scanned.behind[static_cast<size_t>(thread_)]);
    return scanned.all;
  }

 private:
  struct alignas(16) Slot {
    char bytes[256];
  };
  struct Shared {
    std::barrier<> barrier{kThreads};
    Slot slots[kThreads];
  };

  ThreadTeam(int thread, Shared& shared) : thread_(thread), shared_(&shared) {}

  template <class Op, class Values>
  static void butterfly(Values* values, int count) {
    for (int distance = count / 2; distance > 0; distance /= 2) {
      for (int lane = 0; lane < count; ++lane) {
        if ((lane & distance) != 0) continue;
        for (size_t i = 0; i < std::size(values[lane].each); ++i) {
          auto& a = values[lane].each[i];
          auto& b = values[lane ^ distance].each[i];
          const auto both = Op::of(a, b);
          a = b = both;
        }
      }
    }
  }

  int thread_;
  Shared* shared_;
};

// The same as HostRun, by threads of their own.
template <int threads>
struct ThreadRun {
  template <class Program>
  void operator()(int64_t teams, Program program) const {
    ThreadTeam<threads>::run(static_cast<int>(teams), program);
  }
};

}  // namespace tether
