#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include <cstdint>

#include "../logits/inputs.h"
#include "linear_types.h"

// The head of a language model, logits = hidden weight^T + bias, a chunk of rows at a time.

namespace tether::detail {

using LinearInputs = LinearLogpsInputs<at::Tensor>;

struct WantedLinear {
  bool hidden, weight, bias;

  bool any() const { return hidden || weight || bias; }
};

// Each like its input; undefined where it is not wanted.
struct LinearGradient {
  at::Tensor hidden;
  at::Tensor weight;
  at::Tensor bias;
};

// Of logits at a time.
int64_t bytes_of_chunk(const LinearInputs& inputs, const LinearOptions& options);

// The rows that a walk visits: those where a condition holds. On CUDA, where they would have to be
// waited for, all are, the others with hidden states of 0.
struct VisitedRows {
  at::Tensor places;  // int64 [M], ascending; undefined: all
  at::Tensor others;  // bool [N]; undefined: none

  // active: bool [N]
  static VisitedRows where(const at::Tensor& active, const LinearInputs& inputs);
};

// One walk over some rows of the inputs. The logits of a chunk stand in one buffer, which the next
// chunk overwrites.
class LinearSweep {
 public:
  // inputs: of as_rows (linear_checks.h). kept: the logits of these rows, made before, which are
  // then the only chunk.
  LinearSweep(const LinearInputs& inputs, const VisitedRows& rows, const LinearOptions& options,
              const at::Tensor& kept = {});

  struct Chunk {
    int64_t begin, count;  // its rows count from 0 to M
    at::Tensor hidden;     // [C, H]
    at::Tensor logits;     // [C, V], contiguous
    at::Tensor targets;    // [C]
    at::Tensor rows;       // [C], undefined if all rows are visited
    at::Tensor support;    // [C, K], undefined if there is none

    // What its rows have of something [N, ...]: a view where all are visited. Undefined of nothing.
    at::Tensor of(const at::Tensor& all) const;
  };

  int64_t chunks() const { return chunks_; }
  Chunk load(int64_t chunk);  // one matrix product, none of kept logits

 private:
  const LinearInputs& inputs_;
  at::Tensor rows_, others_;  // of VisitedRows
  int64_t count_, chunks_;
  int64_t padded_;  // rows of a product, or 0: those that there are
  bool kept_;
  at::Tensor buffer_;
  // Products into memory of ours are in its type.
  c10::impl::ExcludeDispatchKeyGuard no_autocast_{c10::autocast_dispatch_keyset};
};

// Sums the gradients over the chunks of a sweep: a matrix product each for hidden and weight. That
// of a weight of halves is added up in float32 if there is more than one chunk; on CUDA the
// products are in float32 too.
class LinearGradientSum {
 public:
  LinearGradientSum(const LinearInputs& inputs, WantedLinear wanted, int64_t chunks);

  // chunk.logits: the gradient of the logits.
  void add(const LinearSweep::Chunk& chunk);
  LinearGradient take();

 private:
  void add_to_weight(const at::Tensor& a, const at::Tensor& b);  // their product

  const LinearInputs& inputs_;
  LinearGradient sums_;
  bool widens_ = false;  // the products, where sums are wider
  at::Tensor product_;   // else: of one chunk
  bool first_ = true;
};

}  // namespace tether::detail
