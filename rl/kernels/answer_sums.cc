#include "rl/kernels/answer_sums.h"

#include <algorithm>
#include <cmath>

#include "core/sum.h"
#include "rl/kernels/level_block.h"
#include "rl/kernels/token_block.h"

namespace tether {
namespace {

// An answer weighs its tokens twice: for its score, where the tail of a longer answer may weigh
// less, and for the NLL, whose mask may be another one.
template <class T>
struct AnswerBlock : TokenBlock<T> {
  alignas(64) T nll_weight[kBlock];
};

// A block of tokens by both.
template <class T>
TETHER_CLONES void fill_two_gradients(T score_slope, T nll_slope, AnswerBlock<T>& block) {
  const int size = block.size / kLanes * kLanes;
#pragma GCC ivdep
  for (int i = 0; i < size; ++i) {  // VECTOR
    const T w = block.weight[i], q = block.nll_weight[i];
    block.dlogp[i] = bounded(keep(mask<T>(w != T(0)), w * score_slope) +
                             keep(mask<T>(q != T(0)), q * nll_slope));
  }
}

// The same of slopes beyond T: what overflows meets its weight first, which may bring it back.
template <class T>
void fill_far_gradients(const AnswerSlopes& slope, AnswerBlock<T>& block) {
  for (int i = 0; i < block.size; ++i) {
    const double w = double(block.weight[i]), q = double(block.nll_weight[i]);
    block.dlogp[i] = narrow<T>((w == 0 ? 0 : w * slope.score) + (q == 0 ? 0 : q * slope.nll));
  }
}

template <class T>
class Answers {
 public:
  Answers(const PreferenceArrays& batch, const PreferenceObjective& objective,
          const Executor& executor)
      : batch_(batch),
        objective_(objective),
        executor_(executor),
        has_nll_mask_(batch.nll_mask && objective.nll.coefficient != 0) {
    if (objective.ld_alpha < 1) find_shorter_lengths();
  }

  std::vector<AnswerSums> sums() const {
    std::vector<AnswerSums> out(static_cast<size_t>(batch_.layout.rows));
    for_each_row([&](int64_t row, AnswerBlock<T>& block) {
      out[static_cast<size_t>(row)] = sums_of(row, block);
    });
    return out;
  }

  void store(const std::vector<AnswerSlopes>& slopes, const MutableArray& dlogps) const {
    for_each_row([&](int64_t row, AnswerBlock<T>& block) {
      const AnswerSlopes& slope = slopes[static_cast<size_t>(row)];
      const bool far = is_beyond<T>(slope.score) || is_beyond<T>(slope.nll) ||
                       is_beyond<T>(slope.score + slope.nll);
      for_each_block(row, block, [&](int64_t column, int count, int64_t& seen) {
        if (!has_nll_mask_ && shorter_.empty() && !far) {
          fill_shared_gradient<false, false>(T(slope.score + slope.nll), T(0), 0, block.size,
                                             block);
        } else {
          if (has_nll_mask_) {
            load(batch_.nll_mask, row, column, count, nullptr, block.nll_weight);
          } else {
            std::copy_n(block.weight, block.size, block.nll_weight);
          }
          weigh_tail(row, block, seen);
          far ? fill_far_gradients(slope, block)
              : fill_two_gradients(T(slope.score), T(slope.nll), block);
        }
        store_block(batch_.layout, dlogps, row, column, count, block.dlogp);
      });
    });
  }

 private:
  template <class Visit>
  void for_each_row(Visit visit) const {
    const Chunks chunks = Chunks::of(batch_.layout.rows, batch_.layout.elements());
    parallel_for(executor_, chunks.count, [&](int64_t chunk) {
      AnswerBlock<T> block;
      for (int64_t row = chunks.begin(chunk); row < chunks.end(chunk); ++row) visit(row, block);
    });
  }

  void load(const ConstArray& array, int64_t row, int64_t column, int count, const T* weights,
            T* out) const {
    load_block(batch_.layout, array, row, column, count, weights, out);
  }

  // visit(column, count, tokens before) for every block of the row, with its weights loaded; it
  // counts the tokens on.
  template <class Visit>
  void for_each_block(int64_t row, AnswerBlock<T>& block, Visit visit) const {
    const int64_t length = batch_.layout.length(row);
    int64_t seen = 0;
    for (int64_t column = 0; column < length; column += kBlock) {
      const int count = static_cast<int>(std::min<int64_t>(kBlock, length - column));
      block.size = whole_lanes(count);
      load(batch_.response_mask, row, column, count, nullptr, block.weight);
      visit(column, count, seen);
    }
  }

  void find_shorter_lengths() {
    std::vector<int64_t> lengths(static_cast<size_t>(batch_.layout.rows));
    for_each_row([&](int64_t row, AnswerBlock<T>& block) {
      int64_t& length = lengths[static_cast<size_t>(row)];
      for_each_block(row, block, [&](int64_t, int, int64_t&) {
        length += std::count_if(block.weight, block.weight + block.size,
                                [](T weight) { return weight != 0; });
      });
    });
    const size_t half = lengths.size() / 2;
    shorter_ = lengths;
    for (size_t i = 0; i < 2 * half; ++i) {
      shorter_[i] = std::min(lengths[i % half], lengths[i % half + half]);
    }
  }

  // The weights of the score: ld_alpha w from the end of the shorter answer on.
  void weigh_tail(int64_t row, AnswerBlock<T>& block, int64_t& seen) const {
    if (shorter_.empty()) return;
    for (int i = 0; i < block.size; ++i) {
      if (block.weight[i] == T(0)) continue;
      if (seen >= shorter_[static_cast<size_t>(row)]) block.weight[i] *= T(objective_.ld_alpha);
      ++seen;
    }
  }

  AnswerSums sums_of(int64_t row, AnswerBlock<T>& block) const {
    LaneSum tokens, logps, log_ratios, tail_logps, tail_log_ratios;
    for_each_block(row, block, [&](int64_t column, int count, int64_t& seen) {
      load(batch_.logps, row, column, count, block.weight, block.logp);
      if (objective_.reference) {
        load(batch_.ref_logps, row, column, count, block.weight, block.old_logp);
      } else {
        std::fill_n(block.old_logp, kBlock, T(0));
      }
      sum_weights(block.weight, block.size, tokens);
      sum_level<false>(block, {}, logps, log_ratios);
      if (shorter_.empty()) return;
      weigh_tail(row, block, seen);
      sum_level<false>(block, {}, tail_logps, tail_log_ratios);
    });
    AnswerSums out{.n = tokens.total(), .logp = logps.total()};
    out.score = shorter_.empty() ? log_ratios.total() : tail_log_ratios.total();
    out.nll_n = out.n;
    out.nll_logp = out.logp;
    if (has_nll_mask_) add_nll(row, block, out);
    return out;
  }

  void add_nll(int64_t row, AnswerBlock<T>& block, AnswerSums& out) const {
    LaneSum tokens, logps, unused;
    std::fill_n(block.old_logp, kBlock, T(0));
    for_each_block(row, block, [&](int64_t column, int count, int64_t&) {
      load(batch_.nll_mask, row, column, count, nullptr, block.weight);
      load(batch_.logps, row, column, count, block.weight, block.logp);
      sum_weights(block.weight, block.size, tokens);
      sum_level<false>(block, {}, logps, unused);
    });
    out.nll_n = tokens.total();
    out.nll_logp = logps.total();
  }

  const PreferenceArrays& batch_;
  const PreferenceObjective& objective_;
  const Executor& executor_;
  bool has_nll_mask_;
  std::vector<int64_t> shorter_;  // tokens of the shorter answer of the pair; empty: not asked for
};

bool is_wide(const PreferenceArrays& batch) { return batch.logps.dtype == DType::float64; }

}  // namespace

std::vector<AnswerSums> answer_sums(std::string_view function, const PreferenceArrays& batch,
                                    const PreferenceObjective& objective,
                                    const Executor& executor) {
  const std::vector<AnswerSums> out = is_wide(batch)
                                          ? Answers<double>(batch, objective, executor).sums()
                                          : Answers<float>(batch, objective, executor).sums();
  for (const AnswerSums& answer : out) {
    if (std::isnan(answer.n)) check_weights(function, batch.layout, batch.response_mask);
    if (std::isnan(answer.nll_n)) check_weights(function, batch.layout, batch.nll_mask, "nll_mask");
  }
  return out;
}

void store_gradients(const PreferenceArrays& batch, const PreferenceObjective& objective,
                     const std::vector<AnswerSlopes>& slopes, const MutableArray& dlogps,
                     const Executor& executor) {
  if (is_wide(batch)) {
    Answers<double>(batch, objective, executor).store(slopes, dlogps);
  } else {
    Answers<float>(batch, objective, executor).store(slopes, dlogps);
  }
}

}  // namespace tether
