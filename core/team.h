#pragma once

#include "macros.h"

// A kernel for an accelerator is a program of a team of threads, in phases:
//
//   Team::kThreads                            how many they are, whole warps of 32
//   typename Team::template Local<State>      what each thread keeps from one phase to the next
//   team.each(local, body)                    body(thread, state) in every thread
//   team.template reduce<Op>(local, numbers)  Op over all threads of numbers(state), in each place
//
// What a thread wrote in one `each` the others may read after a `reduce`. Reductions go by one
// fixed tree: the same bits every run. DeviceTeam is a block of threads. The tests run the same
// program on the host: thread by thread (tests/host_team.h), and by real threads
// (tests/thread_team.h), so that all but the device's instructions and speed is tested anywhere.

namespace tether {

template <class T, int N>
struct Several {
  T each[N];
};

struct Sum {
  template <class T>
  static TETHER_TEAM T of(T a, T b) {
    return a + b;
  }
};

// Not of NaN.
struct Max {
  template <class T>
  static TETHER_TEAM T of(T a, T b) {
    return a > b ? a : b;
  }
};

// Of a program without phases.
struct NoState {};

inline constexpr int kWarp = 32;

#if defined(__CUDACC__)

template <int kBlockThreads>
struct DeviceTeam {
  static constexpr int kThreads = kBlockThreads;

  template <class State>
  struct Local {
    State state;
  };

  template <class State, class Body>
  TETHER_TEAM void each(Local<State>& local, Body body) const {
    body(static_cast<int>(threadIdx.x), local.state);
  }

  template <class Op, class State, class Numbers>
  TETHER_TEAM auto reduce(const Local<State>& local, Numbers numbers) const {
    constexpr int kWarps = kThreads / kWarp;
    auto values = numbers(local.state);
    __shared__ decltype(values) of_warps[kWarps];
    butterfly<Op, kWarp>(values);
    __syncthreads();  // the last call's have been read
    if (threadIdx.x % kWarp == 0) of_warps[threadIdx.x / kWarp] = values;
    __syncthreads();
    values = of_warps[threadIdx.x % kWarps];
    butterfly<Op, kWarps>(values);
    return values;
  }

 private:
  template <class Op, int kGroup, class T, int N>
  static TETHER_TEAM void butterfly(Several<T, N>& values) {
    TETHER_UNROLL
    for (int distance = kGroup / 2; distance > 0; distance /= 2) {
      TETHER_UNROLL
      for (int i = 0; i < N; ++i) {
        values.each[i] = Op::of(values.each[i], __shfl_xor_sync(~0u, values.each[i], distance));
      }
    }
  }
};

#endif

}  // namespace tether
