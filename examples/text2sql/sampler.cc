#include "examples/text2sql/sampler.h"

#include <ATen/ATen.h>

#include <algorithm>

#include "examples/text2sql/random.h"
#include "examples/text2sql/tokenizer.h"

namespace text2sql {
namespace {

// Finished rows are computed along until this share of the rows is finished.
constexpr double kDropFinished = 0.3;

at::Tensor pad(const std::vector<Ids>& rows, bool left) {
  size_t longest = 0;
  for (const Ids& row : rows) longest = std::max(longest, row.size());
  at::Tensor result = at::full({static_cast<int64_t>(rows.size()), static_cast<int64_t>(longest)},
                               Tokenizer::pad, at::kLong);
  int64_t* out = result.mutable_data_ptr<int64_t>();
  for (const Ids& row : rows) {
    std::copy(row.begin(), row.end(), left ? out + (longest - row.size()) : out);
    out += longest;
  }
  return result;
}

// Inverse of the cumulative distribution at one uniform number per row: at::multinomial draws one
// number per entry of the vocabulary, which takes longer than the transformer.
at::Tensor draw(const at::Tensor& logits, std::vector<Random>& streams,
                const std::vector<int64_t>& alive) {
  const at::Tensor cumulative = at::cumsum(at::softmax(logits, -1), -1);
  at::Tensor uniform = at::empty({logits.size(0), 1});
  float* u = uniform.mutable_data_ptr<float>();
  for (const int64_t row : alive) {
    *u++ = static_cast<float>(streams[static_cast<size_t>(row)].next() >> 40) * 0x1.0p-24F;
  }
  const at::Tensor total = cumulative.narrow(-1, logits.size(-1) - 1, 1);
  return at::searchsorted(cumulative, uniform * total, /*out_int32=*/false, /*right=*/true)
      .clamp_max_(logits.size(-1) - 1)
      .squeeze(-1);
}

class Generation {
 public:
  Generation(Transformer& model, const std::vector<Ids>& prompts, const SamplerOptions& options)
      : model_(model), options_(options) {
    const auto rows = static_cast<int64_t>(prompts.size()) * options.samples_per_prompt;
    completions_.resize(static_cast<size_t>(rows));
    for (int64_t row = 0; row < rows; ++row) {
      alive_.push_back(row);
      streams_.emplace_back(Random::mix(options.seed) + static_cast<uint64_t>(row));
    }
    // <sql> is each row's first token of the loop; the context is what comes before it.
    std::vector<Ids> before_sql = prompts;
    for (Ids& prompt : before_sql) prompt.pop_back();
    context_ = model.read(pad_left(before_sql), lengths_of(before_sql))
                   .repeat_interleave(options.samples_per_prompt);
    context_.reserve(options.max_tokens);
    tokens_ = at::full({rows}, Tokenizer::sql, at::kLong);
  }

  std::vector<Ids> run() {
    for (int64_t t = 0; t < options_.max_tokens && !alive_.empty(); ++t) {
      const at::Tensor logits = model_.logits(model_.step(tokens_, context_));
      tokens_ = options_.greedy ? at::argmax(logits, -1) : draw(logits, streams_, alive_);
      append();
      drop_finished();
    }
    return std::move(completions_);
  }

 private:
  static bool finished(const Ids& completion) {
    return !completion.empty() && completion.back() == Tokenizer::eos;
  }

  void append() {
    const int64_t* token = tokens_.const_data_ptr<int64_t>();
    for (const int64_t row : alive_) {
      Ids& completion = completions_[static_cast<size_t>(row)];
      if (!finished(completion)) completion.push_back(static_cast<int32_t>(*token));
      ++token;
    }
  }

  void drop_finished() {
    std::vector<int64_t> kept, kept_rows;
    for (size_t i = 0; i < alive_.size(); ++i) {
      if (finished(completions_[static_cast<size_t>(alive_[i])])) continue;
      kept.push_back(static_cast<int64_t>(i));
      kept_rows.push_back(alive_[i]);
    }
    const auto enough =
        static_cast<size_t>((1 - kDropFinished) * static_cast<double>(alive_.size()));
    if (kept.size() > enough) return;
    const at::Tensor index = at::tensor(kept, at::kLong);
    context_.select_rows(index);
    tokens_ = tokens_.index_select(0, index);
    alive_ = std::move(kept_rows);
  }

  Transformer& model_;
  SamplerOptions options_;
  std::vector<Ids> completions_;
  std::vector<Random> streams_;
  std::vector<int64_t> alive_;  // completion of each row in the batch
  Context context_;
  at::Tensor tokens_;
};

}  // namespace

at::Tensor pad_left(const std::vector<Ids>& rows) { return pad(rows, true); }
at::Tensor pad_right(const std::vector<Ids>& rows) { return pad(rows, false); }

at::Tensor lengths_of(const std::vector<Ids>& rows) {
  std::vector<int64_t> lengths;
  for (const Ids& row : rows) lengths.push_back(static_cast<int64_t>(row.size()));
  return at::tensor(lengths, at::kLong);
}

at::Tensor attention_mask(const std::vector<Ids>& rows) {
  const at::Tensor lengths = lengths_of(rows);
  return at::arange(lengths.max().item<int64_t>()) < lengths.unsqueeze(1);
}

std::vector<Ids> sample(Transformer& model, const std::vector<Ids>& prompts,
                        const SamplerOptions& options) {
  if (prompts.empty()) return {};
  const c10::InferenceMode no_grad;
  return Generation(model, prompts, options).run();
}

}  // namespace text2sql
