#pragma once

#include "team.h"

#if defined(__CUDACC__)
#include <cooperative_groups.h>
#endif

// A team of several blocks of a device that run side by side and read each other's memory: a
// cluster, in code for sm_90 and later (has_clusters of cuda_launch.h says so of a kernel). How
// many blocks it has is known at the launch alone:
//
//   team.threads()   how many threads they are
//   team.leave()     the last thing of a kernel: no block ends while others may read its memory
//
// A reduction goes over the threads of each block as that of DeviceTeam, then over the blocks in
// their order.

namespace tether {

#if defined(__CUDACC__)

template <int kBlockThreads>
struct DeviceCluster {
  template <class State>
  using Local = typename DeviceTeam<kBlockThreads>::template Local<State>;

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  static TETHER_TEAM int blocks() {
    return static_cast<int>(cooperative_groups::this_cluster().num_blocks());
  }
  static TETHER_TEAM int rank() {
    return static_cast<int>(cooperative_groups::this_cluster().block_rank());
  }
  static TETHER_TEAM void wait() { cooperative_groups::this_cluster().sync(); }
  template <class Values>
  static TETHER_TEAM Values of_block(Values* own, int block) {
    return *cooperative_groups::this_cluster().map_shared_rank(own, block);
  }
#else
  static TETHER_TEAM int blocks() { return 1; }
  static TETHER_TEAM int rank() { return 0; }
  static TETHER_TEAM void wait() {}
  template <class Values>
  static TETHER_TEAM Values of_block(Values* own, int) {
    return *own;
  }
#endif

  TETHER_TEAM int threads() const { return kBlockThreads * blocks(); }

  template <class State, class Body>
  TETHER_TEAM void each(Local<State>& local, Body body) const {
    body(rank() * kBlockThreads + static_cast<int>(threadIdx.x), local.state);
  }

  template <class Op, class State, class Numbers>
  TETHER_TEAM auto reduce(const Local<State>& local, Numbers numbers) const {
    auto values = DeviceTeam<kBlockThreads>{}.template reduce<Op>(local, numbers);
    if (blocks() == 1) return values;
    __shared__ decltype(values) own;
    wait();  // the last call's have been read
    if (threadIdx.x == 0) own = values;
    wait();
    values = of_block(&own, 0);
    for (int block = 1; block < blocks(); ++block) {
      const auto more = of_block(&own, block);
      TETHER_UNROLL
      for (size_t i = 0; i < sizeof(values.each) / sizeof(values.each[0]); ++i) {
        values.each[i] = Op::of(values.each[i], more.each[i]);
      }
    }
    return values;
  }

  TETHER_TEAM void leave() const {
    if (blocks() > 1) wait();
  }
};

#endif

}  // namespace tether
