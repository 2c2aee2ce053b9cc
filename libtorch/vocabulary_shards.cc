#include "libtorch/vocabulary_shards.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>

#include <array>
#include <bit>
#include <cmath>
#include <numbers>
#include <string>
#include <tuple>

#include "libtorch/arrays.h"
#include "logits/final_logit.h"
#include "logits/vocabulary_shards.h"

namespace tether::detail {
namespace {

constexpr const char* kName = "token_logps";
using Header = std::array<double, kStatistics>;
constexpr int64_t kIds = 2, kTargets = kStatistics - 1;  // in a ShardHeader

// [shards, 1 + N, 8] of all ranks.
at::Tensor gathered(const VocabularyShard& shard, const at::Tensor& ours) {
  const at::Tensor all = shard.gather(ours);
  const std::string where = named(kName, "shard.gather must return ");
  require(all.defined(), [&] { return where + "a tensor, got none"; });
  const bool good = all.scalar_type() == at::kDouble && all.device() == ours.device() &&
                    all.dim() == 3 && all.size(0) >= 1 && all.sizes().slice(1) == ours.sizes();
  require(good, [&] {
    return where + "float64 [shards, " + text(ours.size(0)) + ", " + text(kStatistics) + "] on " +
           ours.device().str() + ", got " + dtype_text(all.scalar_type()) + " " +
           shape_text(all.sizes()) + " on " + all.device().str();
  });
  return all.contiguous();
}

// ---- on a device --------------------------------------------------------------------------------

// A number that other ids hardly have; a hash of them would be waited for.
at::Tensor sum_by_place(const at::Tensor& ids) {
  const at::Tensor flat = ids.reshape({-1});
  return (flat * at::arange(1, flat.size(0) + 1, flat.options())).sum();
}

// [1 + N, 8] of this rank: its header, then its states.
at::Tensor block_of(const RowOptions& options, int64_t columns, const at::Tensor& targets,
                    const at::Tensor& support, const at::Tensor& states) {
  const at::Tensor block =
      at::zeros({1 + states.size(0), kStatistics}, states.options().dtype(at::kDouble));
  block.slice(0, 1).slice(1, 0, kRowState).copy_(states);
  const auto header = std::bit_cast<Header>(shard_header(options, columns, nullptr, 0));
  const at::Tensor own = block.select(0, 0);
  for (int64_t i = 0; i < kTargets; ++i) own.select(0, i).fill_(header[static_cast<size_t>(i)]);
  at::Tensor sum = sum_by_place(targets) + options.ignore_index;
  if (support.defined()) sum = sum + sum_by_place(support);
  own.select(0, kTargets).copy_(sum);
  return block;
}

// Whether the columns of these headers [shards, 8] are all ids without gap or overlap, and the rest
// is the same.
at::Tensor fit(const at::Tensor& headers, int64_t ids) {
  const int64_t shards = headers.size(0);
  const auto [first, order] = headers.select(1, 0).sort();
  const at::Tensor end = first + headers.select(1, 1).index_select(0, order);
  const at::Tensor tiled = (first.slice(0, 1) == end.slice(0, 0, shards - 1)).all();
  const at::Tensor same = (headers.slice(1, kIds) == headers.slice(0, 0, 1).slice(1, kIds)).all();
  return tiled & same & (first.select(0, 0) == 0) & (end.select(0, shards - 1) == ids) &
         (headers.select(0, 0).select(0, kIds) == ids);
}

// States of the whole rows, [N, kRowState] in float64, in the words of RowState.
at::Tensor merged(const at::Tensor& parts, const RowOptions& options) {
  const auto of = [&](int64_t i) { return parts.select(2, i); };  // [shards, N]
  const at::Tensor reference = of(0), total = of(1), weighted = of(2);
  const at::Tensor top = reference.amax(0);
  const double k = rows::multiplier(options) * std::numbers::log2e;
  const at::Tensor shift = ((reference - top) * k).clamp_min(-1100), power = shift.exp2();
  return at::stack({top, (total * power).sum(0), ((weighted + total * shift) * power).sum(0),
                    of(3).amax(0), (of(4) * power * power).sum(0), of(5).sum(0), of(6).sum(0)},
                   -1);
}

}  // namespace

void check_shard(const VocabularyShard& shard, const at::Tensor& logits) {
  const auto must = [](bool holds, const auto& sentence) {
    require(holds, [&] { return named(kName, "shard") + sentence(); });
  };
  must(shard.ids != 0 || (shard.first_id == 0 && !shard.gather),
       [] { return ".ids must be given with first_id or gather, got 0"; });
  if (shard.ids == 0) return;
  must(logits.is_cpu() || row_kernels(logits) != nullptr,
       [&] { return " must be absent for logits on " + logits.device().str() + ", got one"; });
  must(shard.ids >= logits.size(-1), [&] {
    return ".ids must be at least " + text(logits.size(-1)) + " like logits " +
           shape_text(logits.sizes()) + ", got " + text(shard.ids);
  });
  const int64_t last = shard.ids - logits.size(-1);
  must(0 <= shard.first_id && shard.first_id <= last,
       [&] { return ".first_id must be in [0, " + text(last) + "], got " + text(shard.first_id); });
  must(bool(shard.gather), [] { return ".gather must be given, got none"; });
}

void gather_shards(const VocabularyShard& shard, int64_t columns, const at::Tensor& targets,
                   const at::Tensor& support, const RowOptions& options,
                   const at::Tensor& statistics) {
  const int64_t rows = statistics.size(0);
  const at::Tensor block = empty_statistics(1 + rows);
  const int64_t* ids = targets.const_data_ptr<int64_t>();
  const KeptIds kept = support.defined() ? kept_ids(support) : KeptIds{};
  *statistics_of(block) = std::bit_cast<RowStatistics>(
      shard_header(options, columns, ids, rows, support.defined() ? &kept : nullptr));
  block.slice(0, 1).copy_(statistics);
  const at::Tensor in = gathered(shard, block);
  merge_shards(kName, statistics_of(in), in.size(0), rows, ids, options, statistics_of(statistics));
}

void gather_on_device(const VocabularyShard& shard, int64_t columns, const at::Tensor& targets,
                      const at::Tensor& support, const RowOptions& options,
                      const RowsOnDevice& rows) {
  const at::Tensor blocks =
      gathered(shard, block_of(options, columns, targets, support, rows.states));
  const at::Tensor parts = blocks.slice(1, 1).slice(2, 0, kRowState);
  const at::Tensor ignored = targets.view({-1}) == options.ignore_index;
  // All ranks have the same of an ignored row.
  const at::Tensor states =
      at::where(ignored.unsqueeze(-1), parts.select(0, 0), merged(parts, options));
  const at::Tensor sum = states.select(1, 1);
  const at::Tensor bad = (sum == 0) | ~fit(blocks.select(1, 0), shard.ids);
  sum.masked_fill_(bad & ~ignored, std::nan(""));
  rows.states.copy_(states);
  const at::Tensor log_sum = sum.log(), shape = rows.logps;
  const at::Tensor target = states.select(1, 3) - states.select(1, 0);
  rows.logps.copy_((target * rows::multiplier(options) - log_sum).clamp_max(0).view_as(shape));
  if (!rows.entropies.defined()) return;
  const at::Tensor mean = states.select(1, 2) / sum * std::numbers::ln2;
  rows.entropies.copy_((log_sum - mean).clamp_min(0).view_as(shape));
}

}  // namespace tether::detail
