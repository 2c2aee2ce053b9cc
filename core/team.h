#pragma once

#include <cstdint>
#include <cstring>

#include "macros.h"

// A kernel for an accelerator is a program of a team of threads, in phases:
//
//   Team::kThreads                            how many they are, whole warps of 32
//   typename Team::template Local<State>      what each thread keeps from one phase to the next
//   team.each(local, body)                    body(thread, state) in every thread
//   team.template reduce<Op>(local, numbers)  Op over all threads of numbers(state), in each place
//   team.template scan_back<Op>(local, part, use)
//                                             use(state, Op over the part(state) of all threads
//                                             behind it) in every thread; returns Op over all
//
// What a thread wrote in one `each` the others may read after a `reduce` or `scan_back`. Both go by
// one fixed tree: the same bits every run. DeviceTeam is a block of threads. The tests run the same
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

// An Op of a scan is associative but for rounding: of(before, behind), and none() is what changes
// nothing. Parts are plain structs of whole words.

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

  template <class Op, class State, class Part, class Use>
  TETHER_TEAM auto scan_back(Local<State>& local, Part part, Use use) const {
    constexpr int kWarps = kThreads / kWarp;
    using Value = decltype(part(local.state));
    const int lane = static_cast<int>(threadIdx.x) % kWarp;
    const int warp = static_cast<int>(threadIdx.x) / kWarp;
    __shared__ Words<Value> of_warps[kWarps];
    Value own = part(local.state);
    TETHER_UNROLL
    for (int distance = 1; distance < kWarp; distance *= 2) {
      const Value behind = from_lane_behind(own, distance);
      if (lane + distance < kWarp) own = Op::of(own, behind);
    }
    __syncthreads();  // the last call's have been read
    if (lane == 0) of_warps[warp] = Words<Value>::of(own);
    __syncthreads();
    Value all = Op::none(), behind_warp = all;
    TETHER_UNROLL
    for (int i = kWarps - 1; i >= 0; --i) {
      if (i == warp) behind_warp = all;
      all = Op::of(of_warps[i].value(), all);
    }
    const Value in_warp = from_lane_behind(own, 1);
    use(local.state, lane + 1 < kWarp ? Op::of(in_warp, behind_warp) : behind_warp);
    return all;
  }

 private:
  // Shared memory takes no type with a constructor.
  template <class Value>
  struct Words {
    static constexpr int kCount = sizeof(Value) / sizeof(uint32_t);
    static_assert(sizeof(Value) % sizeof(uint32_t) == 0);
    uint32_t each[kCount];

    static TETHER_TEAM Words of(const Value& value) {
      Words out;
      memcpy(out.each, &value, sizeof(value));
      return out;
    }
    TETHER_TEAM Value value() const {
      Value out;
      memcpy(&out, each, sizeof(out));
      return out;
    }
  };

  template <class Value>
  static TETHER_TEAM Value from_lane_behind(const Value& own, int distance) {
    auto words = Words<Value>::of(own);
    TETHER_UNROLL
    for (int i = 0; i < Words<Value>::kCount; ++i) {
      words.each[i] = __shfl_down_sync(~0u, words.each[i], static_cast<unsigned>(distance));
    }
    return words.value();
  }

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
