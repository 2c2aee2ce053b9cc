#pragma once

#include <optional>
#include <string>
#include <vector>

#include "policy_case.h"

// One loss under test, and how its results are looked at and compared.

namespace tether::testing {

// What a run of a loss gave, as doubles: every float is one, so equal means equal bits.
struct Observed {
  double loss = 0;
  std::vector<double> gradient;  // [rows * columns]
  std::map<std::string, double> metrics;
};

enum class Layout { contiguous, transposed, sliced, misaligned, packed };

// How a batch is handed over.
struct Run {
  Normalizer normalizer = {};
  Layout layout = Layout::contiguous;
  std::optional<at::ScalarType> dtype = {};  // absent: the probe's
  std::optional<at::ScalarType> mask_dtype = {};
  bool without_old_logps = false;
  bool expanded_advantages = false;  // [B] seen as [B, T] of stride 0
};

// Something that does not hold, as a sentence; nothing if all is well.
using Failure = std::optional<std::string>;

class Probe {
 public:
  Probe(const PolicyLoss& loss, const PolicyTraits& loss_traits, at::ScalarType type)
      : traits(loss_traits), dtype(type), loss_(loss) {}

  PolicyBatch tensors(const PolicyCase& batch, const Run& run = {}) const;
  Result forward(const PolicyBatch& batch, const Normalizer& normalizer = {}) const {
    return loss_(batch, normalizer);
  }
  // Value, metrics and gradient.
  Observed operator()(const PolicyCase& batch, const Run& run = {}) const;

  // The same batch in double, by the reference.
  Observed reference(const PolicyCase& batch) const;

  // A bound for the magnitude of the terms, in the loss and in each slot of the gradient: values
  // with the advantages -(|A| + 1) and |A| + 1.
  Observed magnitude(const PolicyCase& batch, const Run& run = {}) const;

  // Not one bit differs, metrics too.
  Failure same(const std::string& what, const Observed& got, const Observed& want) const;
  // Loss and gradient differ by no more than rounding.
  Failure close(const std::string& what, const Observed& got, const Observed& want,
                const Observed& magnitude) const;
  Failure close_losses(const std::string& what, double got, double want,
                       const Observed& magnitude) const;
  Failure close_gradients(const std::string& what, const std::vector<double>& got,
                          const std::vector<double>& want, const Observed& magnitude) const;
  // The first if the loss promises bits, else the second.
  Failure same_or_close(const std::string& what, const Observed& got, const Observed& want,
                        const PolicyCase& batch) const;

  double epsilon() const { return dtype == at::kDouble ? 0x1p-52 : 0x1p-23; }
  Normalizer counts(const PolicyCase& batch) const;

  const PolicyTraits& traits;
  const at::ScalarType dtype;

 private:
  const PolicyLoss& loss_;
};

// d loss / d logps as doubles, in the shape of a padded batch. Zeros where the loss has none.
at::Tensor gradient_of(const at::Tensor& loss, const at::Tensor& logps,
                       const at::Tensor& upstream = {}, bool retain = false);
std::vector<double> to_vector(const at::Tensor& tensor);

// "0.5 became nan at [0, 2]"
std::string changed(double want, double got);
std::string place(const PolicyCase& batch, size_t i);

}  // namespace tether::testing
