#include "estimators/advantage/row_scan.h"

#include <algorithm>
#include <cstdint>
#include <string>

#include "core/bit_cast.h"
#include "core/check.h"
#include "core/fields.h"
#include "core/macros.h"
#include "core/select.h"
#include "core/sum.h"

namespace tether {

namespace {

constexpr size_t kValue = 1;
static_assert(kTokenNumbers[kValue].array == &AdvantageArrays::values);

// One row of AdvantageArrays, a block at a time.
struct ScanBlock {
  alignas(64) double numbers[std::size(kTokenNumbers)][kBlock];
  alignas(64) double end_numbers[std::size(kEndArrays)][kBlock];
  alignas(64) double weight[kBlock], lambda[kBlock];
  alignas(64) double after[kBlock];  // V behind the end of an episode
  alignas(64) double base[kBlock], next[kBlock], keep[kBlock];
  alignas(64) double seen[kBlock];  // 0, or NaN where something is no finite number
  alignas(64) double next_value[kBlock], next_x[kBlock];  // V_{t+1}, x_{t+1}, past the ends
  alignas(64) double advantage[kBlock], result[kBlock];
  alignas(64) uint64_t token[kBlock], ends[kBlock];  // all ones where it is one, or ends

  // What is not there stays as it is here.
  explicit ScanBlock(double lambda_of_all) {
    for (auto& each : end_numbers) std::fill_n(each, kBlock, 0.0);
    for (auto& each : numbers) std::fill_n(each, kBlock, 0.0);
    std::fill_n(lambda, kBlock, lambda_of_all);
  }

  void load(const AdvantageArrays& batch, const Recursion& recursion, int64_t row, int64_t column,
            int count) {
    const Traits& reads = recursion.traits();
    const auto read = [&](bool wanted, const ConstArray& array, double* out) {
      if (wanted && array) load_block<double>(batch.layout, array, row, column, count, weight, out);
    };
    load_block<double>(batch.layout, batch.response_mask, row, column, count, nullptr, weight);
    for (size_t i = 0; i < std::size(kTokenNumbers); ++i) {
      const TokenNumber& each = kTokenNumbers[i];
      read(each.needed == nullptr || reads.*each.needed, batch.*each.array, numbers[i]);
    }
    read(recursion.has_lambda(), batch.lambdas, lambda);
    for (size_t i = 0; i < std::size(kEndArrays); ++i) {
      read(true, batch.*kEndArrays[i], end_numbers[i]);
    }
  }

  const double* values() const { return numbers[kValue]; }
  RecursionColumns columns(int count) const {
    RecursionColumns out{{}, lambda, (count + kLanes - 1) / kLanes * kLanes};
    std::copy(std::begin(numbers), std::end(numbers), out.numbers);
    return out;
  }
  StepColumns steps() { return {base, next, keep}; }
};

// What one token passes to the one before it.
struct ScanState {
  double value = 0, x = 0;
  double lambda = 1;    // of the nearest token behind
  bool inside = false;  // not so in the padding after the last token
};

// y where the mask is all ones, x where it is 0, whatever the other is. Without arithmetic: V waits
// for nothing but the V behind it.
TETHER_INLINE double select(uint64_t where, double y, double x) {
  return bit_cast<double>((where & bit_cast<uint64_t>(y)) | (~where & bit_cast<uint64_t>(x)));
}

// What is beyond counts as this: 0 times it is 0, and the sum of three is finite.
TETHER_INLINE double bounded(double x) { return tether::bounded(x, 1e300); }

// A number from outside, or NaN.
double finite_or_nan(double x) { return x + x * 0; }

// The number of slots up to the last token of the row, which the block may hold.
int without_padding(const ScanBlock& block, int count, ScanState& state) {
  while (!state.inside && count > 0 && block.weight[count - 1] == 0) --count;
  state.inside |= count > 0;
  return count;
}

// A masked slot that decays has the lambda of the token behind it.
void spread_lambdas(int count, ScanState& state, ScanBlock& block) {
  for (int i = count - 1; i >= 0; --i) {
    if (block.weight[i] != 0) state.lambda = block.lambda[i];
    block.lambda[i] = state.lambda;
  }
}

// What formulas do not see: where a token is, and whether all that is known of it is finite.
TETHER_CLONES void fill_masks(int count, ScanBlock& block) {
  for (int i = 0; i < count; ++i) {
    block.token[i] = mask<double>(block.weight[i] != 0);
    block.seen[i] = 0;
  }
  for (auto& numbers : block.numbers) {
    for (int i = 0; i < count; ++i) {
      block.seen[i] += numbers[i] * 0;
      numbers[i] = bounded(numbers[i]);
    }
  }
}

// base and keep of a masked slot are 0 and, unless it decays, 1. A formula may hide what is no
// finite number.
TETHER_CLONES void mask_steps(bool decays, int count, ScanBlock& block) {
  for (int i = 0; i < count; ++i) {
    const bool token = block.weight[i] != 0;
    block.base[i] = token ? bounded(block.base[i]) + block.seen[i] : 0.0;
    block.keep[i] = token | decays ? block.keep[i] : 1.0;
  }
}

// The recursion, without a branch: a mask is nothing that a processor could predict. It selects:
// what follows may be NaN. Unless kPlain, x and V do not pass an end, gaps cost a factor, and what
// overflows is bounded. Where kOwn, what the tokens saw of x and V stays for the advantages.
template <bool kPlain, bool kOwn>
TETHER_CLONES void scan(double gap_gamma, int count, ScanState& state, ScanBlock& block) {
  const double* values = block.values();
  double value = state.value, x = state.x;
  for (int i = count - 1; i >= 0; --i) {
    if constexpr (!kPlain) {
      x = keep(~block.ends[i], x);
      value = select(block.ends[i], block.after[i], value);
    }
    if constexpr (kOwn) {
      block.next_value[i] = value;
      block.next_x[i] = x;
    }
    double following = keep(block.token[i], block.next[i] * value), kept = block.keep[i] * x;
    if constexpr (!kPlain) {
      following = bounded(following);
      kept = bounded(kept);
      value *= gap_gamma;
    }
    x = (block.base[i] + following) + kept;
    value = select(block.token[i], values[i], value);
    block.advantage[i] = x;
  }
  state.value = value;
  state.x = x;
}

// False where something overflowed, or is NaN.
TETHER_CLONES bool fill_returns(int count, ScanBlock& block) {
  const double* values = block.values();
  uint64_t beyond = 0;
  for (int i = 0; i < count; ++i) {
    const double x = block.advantage[i];
    beyond |= mask<double>(x * 0 != 0);
    block.advantage[i] = keep(block.token[i], x);
    block.result[i] = block.advantage[i] + values[i];
  }
  return beyond == 0;
}

TETHER_CLONES void fill_own_advantages(int count, ScanBlock& block) {
  for (int i = 0; i < count; ++i) {
    const double following = bounded(block.next[i] * block.next_value[i]);
    const double own =
        (bounded(block.base[i]) + following) + bounded(block.keep[i] * block.next_x[i]);
    block.advantage[i] = keep(block.token[i], own + block.seen[i]);
  }
}

void fill_ends(int count, ScanBlock& block) {
  for (int i = 0; i < count; ++i) {
    const auto end = EpisodeEnd::of([&](size_t place) { return block.end_numbers[place][i]; });
    block.ends[i] = mask<double>(end.ends);
    block.after[i] = end.after;
  }
}

class RowScan {
 public:
  RowScan(const AdvantageArrays& batch, const Recursion& recursion, const MutableArray& advantages,
          const MutableArray& returns)
      : batch_(batch), recursion_(recursion), advantages_(advantages), returns_(returns) {}

  void run(int64_t row, ScanBlock& block) const {
    const RowLayout& layout = batch_.layout;
    ScanState state{.lambda = recursion_.lambda()};
    if (batch_.bootstrap) {
      load_block<double>(layout, batch_.bootstrap, row, 0, 1, nullptr, block.result);
      state.value = finite_or_nan(block.result[0]);
    }
    for (int64_t end = layout.length(row); end > 0; end -= kBlock) {
      const int64_t column = std::max<int64_t>(0, end - kBlock);
      const int count = static_cast<int>(end - column);
      block.load(batch_, recursion_, row, column, count);
      prefetch_next(row, column);
      scan_block(count, state, block);
      const auto store = [&](const MutableArray& array, const double* values) {
        if (array) store_block(layout, array, row, column, count, values);
      };
      store(advantages_, block.advantage);
      store(returns_, block.result);
    }
  }

 private:
  void scan_block(int count, ScanState& state, ScanBlock& block) const {
    const bool decays = recursion_.gap() == MaskGap::decay, own = recursion_.has_own_advantage();
    const bool ends = batch_.done || batch_.truncated;
    const int inside = without_padding(block, count, state);
    std::fill(block.advantage + inside, block.advantage + count, 0.0);
    std::fill(block.result + inside, block.result + count, 0.0);
    if (decays && batch_.lambdas && recursion_.has_lambda()) spread_lambdas(inside, state, block);
    fill_masks(inside, block);
    recursion_.steps(block.columns(inside), block.steps());
    mask_steps(decays, inside, block);
    const ScanState before = state;
    if (!ends && !decays) (own ? scan<true, true> : scan<true, false>)(1, inside, state, block);
    if (ends || decays || !fill_returns(inside, block)) {
      state = before;
      fill_ends(inside, block);
      const double gap_gamma = decays ? recursion_.gamma() : 1;
      (own ? scan<false, true> : scan<false, false>)(gap_gamma, inside, state, block);
      fill_returns(inside, block);
    }
    if (!own) return;
    recursion_.advantages(block.columns(inside), block.steps());
    fill_own_advantages(inside, block);
  }

  // Asks for the block that is wanted after the one of `row` that ends before `column`: rows are
  // walked from their ends, which no processor expects.
  void prefetch_next(int64_t row, int64_t column) const {
    const RowLayout& layout = batch_.layout;
    if (column == 0 && ++row < layout.rows) column = layout.length(row);
    const int count = static_cast<int>(std::min<int64_t>(kBlock, column));
    if (count == 0 || row == layout.rows) return;
    for (const ConstArray* array : {&batch_.response_mask, &batch_.rewards, &batch_.values}) {
      prefetch_block(layout, *array, row, column - count, count);
    }
    for (const MutableArray* array : {&advantages_, &returns_}) {
      prefetch_block(layout, *array, row, column - count, count);
    }
  }

  const AdvantageArrays& batch_;
  const Recursion& recursion_;
  const MutableArray &advantages_, &returns_;
};

void check(std::string_view function, const AdvantageArrays& batch, const Recursion& recursion,
           const MutableArray& advantages, const MutableArray& returns) {
  const RowLayout& layout = batch.layout;
  check_formula(function, recursion);
  check_inputs(function, batch);
  check_reads(function, presence_of(batch), recursion);
  check_array(function, "advantages", layout, advantages);
  check_array(function, "returns", layout, returns);
  check_weights(function, layout, batch.response_mask);
  if (batch.lambdas && recursion.has_lambda()) {
    check_numbers(function, "lambdas", layout, batch.lambdas, batch.response_mask, {0, 1});
  }
}

}  // namespace

void scan_rows(std::string_view function, const AdvantageArrays& batch, const Recursion& recursion,
               const MutableArray& advantages, const MutableArray& returns,
               const Executor& executor) {
  check(function, batch, recursion, advantages, returns);
  const RowScan scan(batch, recursion, advantages, returns);
  const Chunks chunks = Chunks::of(batch.layout.rows, batch.layout.elements());
  parallel_for(executor, chunks.count, [&](int64_t chunk) {
    ScanBlock block(recursion.lambda());
    for (int64_t row = chunks.begin(chunk); row < chunks.end(chunk); ++row) scan.run(row, block);
  });
}

}  // namespace tether
