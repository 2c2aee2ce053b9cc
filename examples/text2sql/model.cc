#include "examples/text2sql/model.h"

#include <ATen/ATen.h>

#include <cmath>
#include <string>

namespace text2sql {
namespace {

constexpr double kNormEpsilon = 1e-6;
constexpr double kRotaryBase = 10000;

at::Tensor norm(const at::Tensor& x, const at::Tensor& gain) {
  return at::rms_norm(x, gain.sizes(), gain, kNormEpsilon);
}

// exp(i * position * base^(-2 k / head)) for every pair k of every head of queries and keys.
at::Tensor rotary_table(const TransformerOptions& options) {
  const int64_t pairs = options.width / options.heads / 2;
  const at::Tensor frequencies =
      at::pow(kRotaryBase, at::arange(pairs, at::kDouble) * (-1.0 / static_cast<double>(pairs)));
  const at::Tensor angles = at::outer(at::arange(options.max_length, at::kDouble), frequencies);
  return at::polar(at::ones_like(angles), angles)
      .repeat({1, 2 * options.heads})
      .to(at::kComplexFloat);
}

// [T, T]: a query sees its own and earlier positions.
at::Tensor causal_mask(int64_t length) { return at::full({length, length}, kMasked).triu_(1); }

at::Tensor attention(const at::Tensor& queries, const at::Tensor& keys, const at::Tensor& values,
                     const at::Tensor& mask) {
  return at::scaled_dot_product_attention(queries, keys, values, mask);
}

}  // namespace

Context Context::repeat_interleave(int64_t times) const {
  Context result{.mask = mask.repeat_interleave(times, 0), .length = length};
  for (const at::Tensor& k : keys) result.keys.push_back(k.repeat_interleave(times, 0));
  for (const at::Tensor& v : values) result.values.push_back(v.repeat_interleave(times, 0));
  return result;
}

void Context::reserve(int64_t more) {
  for (at::Tensor& k : keys) k = at::constant_pad_nd(k, {0, 0, 0, more});
  for (at::Tensor& v : values) v = at::constant_pad_nd(v, {0, 0, 0, more});
  mask = at::constant_pad_nd(mask, {0, more});
}

void Context::select_rows(const at::Tensor& rows) {
  for (at::Tensor& k : keys) k = k.index_select(0, rows);
  for (at::Tensor& v : values) v = v.index_select(0, rows);
  mask = mask.index_select(0, rows);
}

Transformer::Transformer(const TransformerOptions& options, uint64_t seed) : options_(options) {
  const int64_t width = options.width;
  const int64_t hidden = options.mlp_factor * width;
  at::Generator generator = at::detail::createCPUGenerator(seed);
  const auto matrix = [&](const std::string& name, int64_t out, int64_t in, double std) {
    return register_parameter(name, at::empty({out, in}).normal_(0, std, generator));
  };
  const auto gain = [&](const std::string& name) {
    return register_parameter(name, at::ones({width}));
  };
  // Residual branches start small, so that depth does not change the scale of the hidden state.
  const double std = 1 / std::sqrt(static_cast<double>(width));
  const double out_std = std / std::sqrt(2.0 * static_cast<double>(options.layers));

  embedding_ = matrix("embedding", options.vocabulary, width, std);
  for (int64_t layer = 0; layer < options.layers; ++layer) {
    const std::string block = "block" + std::to_string(layer) + "_";
    blocks_.push_back({
        .attention_norm = gain(block + "attention_norm"),
        .attention_in = matrix(block + "attention_in", 3 * width, width, std),
        .attention_out = matrix(block + "attention_out", width, width, out_std),
        .mlp_norm = gain(block + "mlp_norm"),
        .mlp_in = matrix(block + "mlp_in", hidden, width, std),
        .mlp_out = matrix(block + "mlp_out", width, hidden, out_std / 2),
    });
  }
  final_norm_ = gain("final_norm");
  value_head_ = register_parameter("value_head", at::zeros({options.width}));
  rotary_ = register_buffer("rotary", rotary_table(options));
}

template <class Attend>
at::Tensor Transformer::run(const at::Tensor& tokens, int64_t first_position,
                            const Attend& attend) {
  const int64_t rows = tokens.size(0), length = tokens.size(1);
  const int64_t width = options_.width, heads = options_.heads;
  const auto by_head = [&](const at::Tensor& x) {
    return x.view({rows, length, heads, width / heads}).transpose(1, 2);
  };
  const at::Tensor rotary = rotary_.narrow(0, first_position, length);

  at::Tensor x = at::embedding(embedding_, tokens);
  for (int64_t layer = 0; layer < options_.layers; ++layer) {
    const Block& block = blocks_[static_cast<size_t>(layer)];
    const at::Tensor in = at::linear(norm(x, block.attention_norm), block.attention_in);
    const at::Tensor pairs =
        at::view_as_complex(in.narrow(2, 0, 2 * width).unflatten(2, {width, 2}));
    const at::Tensor rotated = at::view_as_real(pairs * rotary).flatten(2);
    const at::Tensor attended =
        attend(static_cast<size_t>(layer), by_head(rotated.narrow(2, 0, width)),
               by_head(rotated.narrow(2, width, width)), by_head(in.narrow(2, 2 * width, width)));
    x = x +
        at::linear(attended.transpose(1, 2).reshape({rows, length, width}), block.attention_out);
    x = x + at::linear(at::gelu(at::linear(norm(x, block.mlp_norm), block.mlp_in)), block.mlp_out);
  }
  return norm(x, final_norm_);
}

at::Tensor Transformer::rows(const at::Tensor& tokens) {
  return run(tokens, 0, [](size_t, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v) {
    return at::scaled_dot_product_attention(q, k, v, {}, 0, /*is_causal=*/true);
  });
}

Context Transformer::read(const at::Tensor& prompts, const at::Tensor& lengths) {
  const int64_t length = prompts.size(1);
  const at::Tensor padded = at::arange(length) < (length - lengths).unsqueeze(1);
  Context context{.mask = padded.to(at::kFloat).mul_(kMasked).view({-1, 1, 1, length}),
                  .length = length};
  const at::Tensor mask = context.mask + causal_mask(length);
  run(prompts, 0, [&](size_t, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v) {
    context.keys.push_back(k);
    context.values.push_back(v);
    return attention(q, k, v, mask);
  });
  return context;
}

at::Tensor Transformer::extend(const at::Tensor& tokens, const Context& context) {
  const int64_t rows = tokens.size(0), length = tokens.size(1);
  const at::Tensor mask = at::cat({context.mask.expand({rows, 1, length, context.length}),
                                   causal_mask(length).expand({rows, 1, length, length})},
                                  3);
  return run(tokens, context.length,
             [&](size_t layer, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v) {
               return attention(q, at::cat({context.keys[layer], k}, 2),
                                at::cat({context.values[layer], v}, 2), mask);
             });
}

at::Tensor Transformer::step(const at::Tensor& tokens, Context& context) {
  const int64_t position = context.length++;
  const at::Tensor mask = context.mask.narrow(3, 0, context.length);
  const at::Tensor hidden =
      run(tokens.unsqueeze(1), position,
          [&](size_t layer, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v) {
            context.keys[layer].narrow(2, position, 1).copy_(k);
            context.values[layer].narrow(2, position, 1).copy_(v);
            return attention(q, context.keys[layer].narrow(2, 0, context.length),
                             context.values[layer].narrow(2, 0, context.length), mask);
          });
  return hidden.squeeze(1);
}

at::Tensor Transformer::values(const at::Tensor& hidden) const {
  return at::matmul(hidden, value_head_);
}

at::Tensor Transformer::logits(const at::Tensor& hidden) const {
  return at::linear(hidden, embedding_);
}

int64_t Transformer::parameter_count() const {
  int64_t count = 0;
  for (const at::Tensor& parameter : parameters()) count += parameter.numel();
  return count;
}

void copy_parameters(const Transformer& from, Transformer& to) {
  const at::NoGradGuard no_grad;
  const std::vector<at::Tensor> source = from.parameters(), target = to.parameters();
  for (size_t i = 0; i < source.size(); ++i) target[i].copy_(source[i]);
}

std::shared_ptr<Transformer> frozen_copy(const Transformer& model) {
  auto copy = std::make_shared<Transformer>(model.options(), 0);
  copy_parameters(model, *copy);
  for (at::Tensor& parameter : copy->parameters()) parameter.requires_grad_(false);
  return copy;
}

}  // namespace text2sql
