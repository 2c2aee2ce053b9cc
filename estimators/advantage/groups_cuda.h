#pragma once

#include <cstdint>
#include <string_view>

#include "../../core/cuda_stream.h"
#include "group_rule.h"

namespace tether::cuda {

// Answers with memory on the device. Groups are of `group_size` consecutive answers, or by id: any
// ids, in any order, groups of any size.
struct GroupBatch {
  const float* rewards = nullptr;  // [count]
  const int64_t* group_ids = nullptr;
  const float* lengths = nullptr;  // tokens of each answer, for rules that read them
  int64_t group_size = 0;          // without ids: `count` is a multiple of it
  int64_t count = 0;
  double* batch_std = nullptr;  // memory for one number, of rules that read the batch
};

// groups.h on a CUDA device, every rule of the catalogue; arithmetic in double, the same bits every
// run. Calls return at once: they add kernels to `stream`, wait for nothing, allocate nothing and
// can be captured in a graph.
//
// By ids an answer looks for its group among all answers: 65536 are 4e9 comparisons. Without memory
// for batch_std every answer finds that by itself too.
//
// Values cannot be refused where the memory is a device's: an infinite reward, and a NaN that is
// not missing, give NaN to the whole group, and so does a length that is none.
//
// Throws Error where there is no kernel: rules of a user's; and for what groups.h refuses without
// looking into memory.
//
// Compiled, and its program executed on the host; not run on a GPU yet (docs/cuda.md).
void advantages_of_groups(std::string_view function, const GroupBatch& batch, const GroupRule& rule,
                          float* advantages, Stream stream);

}  // namespace tether::cuda
