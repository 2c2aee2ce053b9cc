#include "libtorch/support.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/bmm.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/full.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/nonzero.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/csrc/autograd/custom_function.h>

#include <algorithm>
#include <limits>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "libtorch/arrays.h"
#include "libtorch/flat_batch.h"
#include "libtorch/linear_checks.h"
#include "libtorch/linear_token_logps.h"
#include "libtorch/logits_rows.h"
#include "libtorch/stored_gradient.h"
#include "libtorch/support_checks.h"
#include "libtorch/token_logps.h"

namespace tether {
namespace {

using detail::LinearInputs;
using torch::autograd::AutogradContext;
using torch::autograd::Function;
using torch::autograd::variable_list;

constexpr const char* kName = "support";
constexpr const char* kLinear = "linear_token_logps";
constexpr int64_t kAbsent = -1;     // in ids
constexpr int64_t kNowhere = -100;  // in positions
constexpr int64_t kFaster = 128;    // see LinearOfSupport
constexpr double kMinusInfinity = -std::numeric_limits<double>::infinity();

// ---- making one ---------------------------------------------------------------------------------

void check_ids(std::string_view name, const at::Tensor& ids, const at::Tensor& targets) {
  const std::string where = named(kName, name);
  const face::Like<at::Tensor> like{"targets", targets, Shape::tokens, false, 0};
  require(ids.defined(), [&] { return where + " must be given, got none"; });
  face::check_kind(where, name, Kind::ids, ids, like);
  face::check_device(where, ids, like);
}

// [..., K] of ids that lie one token after the other.
at::Tensor padded(const at::Tensor& targets, const at::Tensor& token_ids,
                  const at::Tensor& offsets) {
  check_ids("offsets", offsets, targets);
  const int64_t count = targets.numel();
  require(token_ids.dim() == 1, [&] {
    return named(kName, "token_ids") + " must be [M] with offsets, got " +
           detail::shape_text(token_ids.sizes());
  });
  require(offsets.dim() == 1 && offsets.size(0) == count + 1, [&] {
    return named(kName, "offsets") + " must be [" + text(count + 1) + "] for targets " +
           detail::shape_text(targets.sizes()) + ", got " + detail::shape_text(offsets.sizes());
  });
  const at::Tensor begin = offsets.to(at::kLong), sizes = begin.diff();
  const int64_t first = begin[0].item<int64_t>(), last = begin[count].item<int64_t>();
  require(first == 0 && last == token_ids.size(0), [&] {
    return named(kName, "offsets") + " must run from 0 to " + text(token_ids.size(0)) +
           ", the size of token_ids, got " + text(first) + " to " + text(last);
  });
  require(!(sizes < 0).any().item<bool>(), [&] {
    const auto at = (sizes < 0).to(at::kChar).argmax().item<int64_t>();
    return named(kName, "offsets") + " must not decrease, got " +
           text(begin[at + 1].item<int64_t>()) + " after " + text(begin[at].item<int64_t>()) +
           " at [" + text(at + 1) + "]";
  });
  const int64_t longest = count > 0 ? sizes.max().item<int64_t>() : 0;
  const at::TensorOptions as = begin.options();
  const at::Tensor row = detail::row_of_tokens(token_ids, offsets, count);
  const at::Tensor column = at::arange(last, as) - begin.index_select(0, row);
  const at::Tensor out = at::full({count * longest}, kAbsent, as);
  out.index_copy_(0, row * longest + column, token_ids.to(at::kLong));
  std::vector<int64_t> shape = targets.sizes().vec();
  shape.push_back(longest);
  return out.view(shape);
}

// As it is or of ids one after the other, checked.
at::Tensor checked_sets(const at::Tensor& targets, const at::Tensor& token_ids,
                        const at::Tensor& offsets) {
  check_ids("token_ids", token_ids, targets);
  at::Tensor ids;
  if (offsets.defined()) {
    ids = padded(targets, token_ids, offsets);
  } else {
    const bool like = token_ids.dim() == targets.dim() + 1 &&
                      token_ids.sizes().slice(0, targets.dim()) == targets.sizes();
    require(like, [&] {
      return named(kName, "token_ids") + " must be [..., K] like targets " +
             detail::shape_text(targets.sizes()) + " without offsets, got " +
             detail::shape_text(token_ids.sizes());
    });
    ids = token_ids.to(at::kLong);
  }
  require(!(ids < kAbsent).any().item<bool>(), [&] {
    return named(kName, "token_ids") + " must be at least 0, or -1 for none, got " +
           text(ids.min().item<int64_t>());
  });
  return ids;
}

// ---- using one ----------------------------------------------------------------------------------

// That of the targets that are not ignored, made of the same ones and with known ids.
Support checked(std::string_view function, const Support& support, const at::Tensor& targets,
                int64_t vocabulary, int64_t ignore_index) {
  detail::check_support(function, support, "targets", targets, false);
  const at::Tensor ignored = targets == ignore_index;
  const at::Tensor ids = support.ids.masked_fill(ignored.unsqueeze(-1), kAbsent);
  detail::check_kept_ids(function, ids, vocabulary);
  const at::Tensor found =
      support.ids.gather(-1, support.position.clamp_min(0).unsqueeze(-1)).squeeze(-1);
  const at::Tensor known =
      at::where(support.position == kNowhere, support.whole, found == targets).logical_or(ignored);
  require(known.all().item<bool>(), [&] {
    return named(function, "support") + " must be made of the same targets, got others";
  });
  return {ids, support.position.masked_fill(ignored, kNowhere),
          support.whole.logical_and(ignored.logical_not()), support.added};
}

// Its ids as kernels for CUDA take them, whom nobody waits to look at them: a set of another target
// makes its row NaN.
at::Tensor unseen_ids(std::string_view function, const Support& support, const at::Tensor& targets,
                      int64_t ignore_index) {
  detail::check_support(function, support, "targets", targets, false);
  // Of a target that was ignored when the sets were made: another's id, in place of the whole.
  const at::Tensor unmade =
      (support.position == kNowhere) & ~support.whole & (targets != ignore_index);
  const at::Tensor other = (targets == 0).to(at::kLong).unsqueeze(-1);
  return at::where(unmade.unsqueeze(-1), other, support.ids).contiguous();
}

// token_logps of the kept logits, and where there is no set, of_whole().
template <class Whole>
TokenLogps of_support(const Support& support, const at::Tensor& kept, TokenLogpsOptions options,
                      Whole of_whole) {
  options.row.ignore_index = kNowhere;
  const TokenLogps part = token_logps(kept, support.position, options);
  if (!support.whole.any().item<bool>()) return part;
  const TokenLogps whole = of_whole();
  const auto chosen = [&](const at::Tensor& a, const at::Tensor& b) {
    return a.defined() ? at::where(support.whole, a, b) : a;
  };
  return {chosen(whole.logps, part.logps), chosen(whole.entropies, part.entropies),
          chosen(whole.sum_of_squared_p, part.sum_of_squared_p),
          chosen(whole.mean_logits, part.mean_logits),
          chosen(whole.target_is_largest, part.target_is_largest)};
}

// ---- from hidden states -------------------------------------------------------------------------

// Some active tokens.
struct Piece {
  at::Tensor places, ids, absent, hidden;
};

// visit(piece) for all active tokens, `step` at a time.
template <class Visit>
void for_each_piece(const at::Tensor& hidden, const at::Tensor& ids, const at::Tensor& active,
                    int64_t step, Visit visit) {
  // Sums into memory of ours are in its type.
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  const at::Tensor places = at::nonzero(active.reshape({-1})).view({-1});
  const at::Tensor rows = hidden.reshape({-1, hidden.size(-1)}),
                   sets = ids.reshape({-1, ids.size(-1)});
  for (int64_t begin = 0; begin < places.size(0); begin += step) {
    const at::Tensor some = places.slice(0, begin, std::min(begin + step, places.size(0)));
    const at::Tensor chosen = sets.index_select(0, some);
    visit(Piece{some, chosen.clamp_min(0), chosen < 0, rows.index_select(0, some)});
  }
}

// A token's own product with its kept rows of the head runs at the speed of memory, one of many
// tokens with the whole head at that of arithmetic: on the CPU about kFaster times faster a row.
bool by_rows(const at::Tensor& weight, int64_t size) { return size * kFaster <= weight.size(0); }

// Tokens at a time.
int64_t step_of(const at::Tensor& weight, int64_t size, int64_t chunk_bytes) {
  return std::max<int64_t>(chunk_bytes / (size * weight.size(1) * weight.element_size()), 1);
}

// [n, K, H]: the kept rows of the head.
at::Tensor kept_rows(const at::Tensor& weight, const at::Tensor& ids) {
  return weight.index_select(0, ids.reshape({-1})).view({ids.size(0), ids.size(1), weight.size(1)});
}

class LinearOfSupportGradient : public Function<LinearOfSupportGradient> {
 public:
  static variable_list forward(AutogradContext*, const at::Tensor& hidden, const at::Tensor& weight,
                               const at::Tensor& dlogits, const at::Tensor& ids,
                               const at::Tensor& active, bool has_bias, int64_t chunk_bytes) {
    const int64_t size = ids.size(-1);
    const int64_t step = step_of(weight, size, chunk_bytes);
    // Sums over tokens of half weights are in float32.
    const at::ScalarType wide = weight.element_size() == 2 ? at::kFloat : weight.scalar_type();
    const at::Tensor upstream = dlogits.reshape({-1, size});
    const at::Tensor dhidden = at::zeros({active.numel(), hidden.size(-1)}, hidden.options());
    const at::Tensor dweight = at::zeros(weight.sizes(), weight.options().dtype(wide));
    const at::Tensor dbias = at::zeros({has_bias ? weight.size(0) : 0}, dweight.options());
    for_each_piece(hidden, ids, active, step, [&](const Piece& piece) {
      const at::Tensor part = upstream.index_select(0, piece.places).masked_fill(piece.absent, 0);
      const at::Tensor flat = piece.ids.reshape({-1});
      const at::Tensor rows = kept_rows(weight, piece.ids);
      dhidden.index_copy_(0, piece.places, at::bmm(part.unsqueeze(1), rows).squeeze(1));
      const at::Tensor outer = part.unsqueeze(-1).to(wide) * piece.hidden.unsqueeze(1).to(wide);
      dweight.index_add_(0, flat, outer.view({-1, weight.size(1)}));
      if (has_bias) dbias.index_add_(0, flat, part.reshape({-1}).to(wide));
    });
    const at::ScalarType type = weight.scalar_type();
    return {dhidden.view(hidden.sizes()), dweight.to(type), dbias.to(type)};
  }

  static variable_list backward(AutogradContext*, const variable_list&) {
    detail::refuse_second_backward(kLinear);
  }
};

// [..., K]: the logits of the kept ids, by the kept rows of the head alone.
class LinearOfSupport : public Function<LinearOfSupport> {
 public:
  static at::Tensor forward(AutogradContext* context, const at::Tensor& hidden,
                            const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                            const at::Tensor& ids, const at::Tensor& active, int64_t chunk_bytes) {
    const int64_t size = ids.size(-1);
    const at::Tensor out = at::full(ids.sizes(), kMinusInfinity, weight.options());
    const at::Tensor flat = out.view({-1, size});
    const int64_t step = step_of(weight, size, chunk_bytes);
    for_each_piece(hidden, ids, active, step, [&](const Piece& piece) {
      at::Tensor logits =
          at::bmm(kept_rows(weight, piece.ids), piece.hidden.unsqueeze(-1)).squeeze(-1);
      if (bias) logits = logits + bias->index_select(0, piece.ids.reshape({-1})).view_as(logits);
      flat.index_copy_(0, piece.places, logits.masked_fill(piece.absent, kMinusInfinity));
    });
    context->save_for_backward({detail::savable(hidden), detail::savable(weight)});
    context->saved_data["ids"] = ids;
    context->saved_data["active"] = active;
    context->saved_data["has_bias"] = bias.has_value();
    context->saved_data["chunk_bytes"] = chunk_bytes;
    return out;
  }

  static variable_list backward(AutogradContext* context, const variable_list& upstreams) {
    const variable_list saved = context->get_saved_variables();
    auto& data = context->saved_data;
    const bool has_bias = data["has_bias"].toBool();
    const variable_list out = LinearOfSupportGradient::apply(
        saved[0], saved[1], upstreams[0], data["ids"].toTensor(), data["active"].toTensor(),
        has_bias, data["chunk_bytes"].toInt());
    variable_list gradients(6);
    for (size_t i = 0; i < (has_bias ? 3U : 2U); ++i) {
      if (context->needs_input_grad(i)) gradients[i] = out[i];
    }
    return gradients;
  }
};

// From hidden states by all logits: of some tokens at a time, on other devices of all of them.
TokenLogps by_chunks(const LinearInputs& inputs, const LinearOptions& options,
                     const Support& support) {
  if (inputs.hidden.is_cpu()) {
    LinearInputs kept = inputs;
    kept.support = support.ids.contiguous();
    return detail::linear_token_logps(kept, options);
  }
  const at::Tensor ignored = (inputs.targets == options.row.ignore_index).unsqueeze(-1);
  // 0 times NaN would reach the gradient of the weight.
  const at::Tensor hidden = inputs.hidden.masked_fill(ignored, 0);
  return token_logps(
      at::linear(hidden, inputs.weight, inputs.bias), inputs.targets,
      {.row = options.row, .entropies = options.entropies, .statistics = options.statistics},
      support);
}

}  // namespace

at::Tensor Support::gather(const at::Tensor& logits) const {
  return logits.gather(-1, ids.clamp_min(0)).masked_fill(ids < 0, kMinusInfinity);
}

Support support(const at::Tensor& targets, const at::Tensor& token_ids, const at::Tensor& offsets,
                int64_t ignore_index) {
  return detail::with_public_errors([&] {
    check_ids("targets", targets, targets);
    at::Tensor ids = checked_sets(targets, token_ids, offsets);
    const at::Tensor y = targets.to(at::kLong), active = y != ignore_index;
    require(!(y < 0).logical_and(active).any().item<bool>(), [&] {
      return named(kName, "targets") + " must be at least 0 or ignore_index " + text(ignore_index) +
             ", got " + text(y.masked_fill(active.logical_not(), 0).min().item<int64_t>());
    });
    ids = ids.masked_fill(active.logical_not().unsqueeze(-1), kAbsent);
    const at::Tensor empty = (ids == kAbsent).all(-1);
    const at::Tensor inside = (ids == y.unsqueeze(-1)).any(-1);
    const at::Tensor added = empty.logical_or(inside).logical_not();
    const at::Tensor own = y.masked_fill(added.logical_not(), kAbsent).unsqueeze(-1);
    ids = std::get<0>(at::cat({ids, own}, -1).sort(-1, /*descending=*/true));
    const int64_t width = ids.size(-1);
    const at::Tensor left = ids.slice(-1, 0, width - 1), right = ids.slice(-1, 1, width);
    const at::Tensor again = (left == right).logical_and(right >= 0);
    if (again.any().item<bool>()) {
      right.masked_fill_(again, kAbsent);
      ids = std::get<0>(ids.sort(-1, /*descending=*/true));
    }
    const int64_t longest = ids.numel() > 0 ? (ids >= 0).sum(-1).max().item<int64_t>() : 0;
    ids = ids.slice(-1, 0, std::max<int64_t>(longest, 1)).contiguous();
    const at::Tensor position = (ids == y.unsqueeze(-1)).to(at::kChar).argmax(-1);
    return Support{ids, position.masked_fill(empty, kNowhere), empty.logical_and(active), added};
  });
}

TokenLogps token_logps(const at::Tensor& logits, const at::Tensor& targets,
                       const TokenLogpsOptions& options, const Support& given) {
  return detail::with_public_errors([&] {
    constexpr const char* kFunction = "token_logps";
    face::check_arguments(kFunction,
                          TokenLogpsInputs<at::Tensor>{.logits = logits, .targets = targets});
    const at::Tensor y = targets.to(at::kLong);
    const int64_t ignore_index = options.row.ignore_index;
    if (detail::row_kernels(logits)) {
      const at::Tensor ids = unseen_ids(kFunction, given, y, ignore_index);
      return detail::token_logps(logits, targets, options, ids);
    }
    const int64_t vocabulary = options.shard.ids > 0 ? options.shard.ids : logits.size(-1);
    const Support support = checked(kFunction, given, y, vocabulary, ignore_index);
    if (logits.is_cpu()) {
      return detail::token_logps(logits, targets, options, support.ids.contiguous());
    }
    const at::Tensor others = y.masked_fill(support.whole.logical_not(), ignore_index);
    return of_support(support, support.gather(logits), options,
                      [&] { return token_logps(logits, others, options); });
  });
}

TokenLogps linear_token_logps(const at::Tensor& hidden, const LinearHead& head,
                              const at::Tensor& targets, const LinearOptions& options,
                              const Support& given) {
  return detail::with_public_errors([&] {
    const LinearInputs inputs = detail::checked_linear(kLinear, hidden, head, targets, options);
    const int64_t ignore_index = options.row.ignore_index;
    if (detail::row_kernels(inputs.hidden)) {
      // All rows of the head: which tokens have a set would have to be waited for.
      LinearInputs kept = inputs;
      kept.support = unseen_ids(kLinear, given, inputs.targets, ignore_index);
      return detail::linear_token_logps(kept, options);
    }
    const Support support =
        checked(kLinear, given, inputs.targets, inputs.weight.size(0), ignore_index);
    if (options.rows_per_chunk > 0 || !by_rows(inputs.weight, support.ids.size(-1))) {
      return by_chunks(inputs, options, support);
    }
    const at::Tensor kept = LinearOfSupport::apply(
        *detail::input_of_graph(inputs.hidden), *detail::input_of_graph(inputs.weight),
        detail::input_of_graph(inputs.bias), support.ids, support.position != kNowhere,
        detail::bytes_of_chunk(inputs, options));
    return of_support(
        support, kept,
        {.row = options.row, .entropies = options.entropies, .statistics = options.statistics},
        [&] {
          LinearInputs others = inputs;
          others.targets = inputs.targets.masked_fill(support.whole.logical_not(), ignore_index);
          return detail::linear_token_logps(others, options);
        });
  });
}

}  // namespace tether
