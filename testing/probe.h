#pragma once

#include <map>
#include <optional>
#include <string>
#include <vector>

#include "family.h"

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
  size_t without = kNoArray;  // an array that is not given
  bool expanded = false;      // [B] seen as [B, T] of stride 0
};

// Something that does not hold, as a sentence; nothing if all is well.
using Failure = std::optional<std::string>;

class Probe {
 public:
  Probe(const Subject& subject_in, at::ScalarType type)
      : subject(subject_in), traits(subject.traits), dtype(type), loss_(subject.loss) {}

  Tensors tensors(const Case& batch, const Run& run = {}) const;
  Result forward(const Tensors& batch, const Normalizer& normalizer = {}) const {
    return loss_(batch, normalizer);
  }
  // Value, metrics and gradient.
  Observed operator()(const Case& batch, const Run& run = {}) const;

  // The loss by other means, in double; itself if there are none.
  Probe reference() const;

  Observed magnitude(const Case& batch, const Normalizer& step = {}) const {
    return subject.family.magnitude(*this, batch, step);
  }

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
                        const Case& batch) const;

  double epsilon() const { return dtype == at::kDouble ? 0x1p-52 : 0x1p-23; }
  Normalizer counts(const Case& batch) const;

  const Subject& subject;
  const LossTraits& traits;
  const at::ScalarType dtype;

 private:
  Probe(const Subject& subject_in, const Loss& loss, at::ScalarType type)
      : subject(subject_in), traits(subject.traits), dtype(type), loss_(loss) {}

  const Loss& loss_;
};

// The derivative of a loss as doubles, in the shape of a padded batch. Zeros where it has none.
at::Tensor gradient_of(const at::Tensor& loss, const at::Tensor& of,
                       const at::Tensor& upstream = {}, bool retain = false);
std::vector<double> to_vector(const at::Tensor& tensor);

// "0.5 became nan at [0, 2]"
std::string changed(double want, double got);
std::string place(const Case& batch, size_t i);

std::vector<double> times(std::vector<double> values, double factor);

// For families whose terms have no other bound: what the result is, and how it moves, by what its
// differences are worth, when the first array becomes larger by 2^-8.
Observed magnitude_by_moving(const Probe& probe, const Case& batch, const Normalizer& step);

// C++ that makes this batch.
std::string as_code(const Case& batch, const Subject& subject, at::ScalarType dtype);

}  // namespace tether::testing
