#include "core/half.h"
#include "core/number.h"
#include "estimators/kl/forms.h"
#include "rl/catalogue.h"
#include "rl/value_objective.h"

// Every formula of the library as device code: `./dev check` compiles this file where there is
// nvcc, and nothing runs it. An instance of a kernel is one formula on numbers with N derivatives.

namespace tether {
namespace {

static_assert(sizeof(Constant<float>) == sizeof(float));

// Of what a kernel reads and writes: a column for each value, those of its derivatives behind it.
struct Columns {
  const float* in;
  float* out;
  int stride;

  template <int N>
  __device__ Dual<float, N> number(int column, int i) const {
    Gradient<float, N> grad{};
    if constexpr (N == 1) grad = in[(column + 1) * stride + i];
    if constexpr (N > 1) {
      for (int k = 0; k < N; ++k) grad[k] = in[(column + 1 + k) * stride + i];
    }
    return detail::make<float, N>(in[column * stride + i], grad);
  }
  template <int N>
  __device__ void store(int column, int i, const Dual<float, N>& x) const {
    out[column * stride + i] = x.value;
    if constexpr (N == 1) out[(column + 1) * stride + i] = x.grad;
    if constexpr (N > 1) {
      for (int k = 0; k < N; ++k) out[(column + 1 + k) * stride + i] = x.grad[k];
    }
  }
};

__device__ int index() { return static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x); }

template <class Formula, int N>
__global__ void surrogate(Formula formula, Columns columns) {
  const int i = index();
  const Token<Dual<float, N>, Constant<float>> token{
      columns.number<N>(0, i), columns.number<N>(1, i), columns.number<N>(2, i),
      columns.number<0>(3, i), columns.number<0>(4, i), columns.number<0>(5, i)};
  columns.store(0, i, formula(token));
}

template <class Formula>
__global__ void weight(Formula formula, Columns columns) {
  const int i = index();
  const WeightToken<Constant<float>> token{columns.number<0>(0, i), columns.number<0>(1, i),
                                           columns.number<0>(2, i), columns.number<0>(3, i),
                                           columns.number<0>(4, i)};
  columns.store(0, i, formula(token, formula.measure(token)));
}

template <class Formula, class LinkOfScores, int N>
__global__ void pair_loss(Formula formula, LinkOfScores link, double beta, Columns columns) {
  const int i = index();
  const auto answer = [&](int column) {
    const Dual<float, N> score = columns.number<N>(column, i);
    return Answer<Dual<float, N>>{link(score), score, columns.number<0>(2, i),
                                  columns.number<0>(3, i)};
  };
  const Example<Dual<float, N>> example{{answer(0), answer(1), beta}, columns.number<0>(4, i)};
  columns.store(0, i, detail::loss_of(formula, example));
}

template <class Formula, int N>
__global__ void value_loss(Formula formula, Columns columns) {
  const int i = index();
  const ValueToken<Dual<float, N>> token{columns.number<N>(0, i), columns.number<0>(1, i),
                                         columns.number<0>(2, i)};
  columns.store(0, i, formula(token));
}

template <class Form, int N>
__global__ void kl_form(Form form, KlCorrection correction, KlWeightBounds bounds, double lambda,
                        Columns columns) {
  const int i = index();
  const Dual<float, N> log_ratio = columns.number<N>(0, i);
  columns.store(0, i, k_lambda(log_ratio, lambda));
  columns.store(3, i,
                kl_term(form, form, correction, columns.number<N>(1, i), log_ratio,
                        columns.number<0>(2, i), bounds));
}

// The functions of core/number.h that no formula calls.
template <int N>
__global__ void functions(Columns columns) {
  const int i = index();
  const Dual<float, N> x = columns.number<N>(0, i);
  columns.store(0, i, abs(log(x)) / log1p(x) + 2 / log1mexp(-x) * sigmoid(x));
}

__global__ void halves(const Float16* in, BFloat16* out) {
  const int i = index();
  out[i] = narrowed<BFloat16>(widened<float>(in[i]));
}

template <int N>
void instantiate(const Columns& columns) {
  for_each_surrogate(
      [&](auto formula) { surrogate<decltype(formula), N><<<1, 1>>>(formula, columns); });
  for_each_preference_formula([&](auto formula) {
    for_each_link([&]<class Formula>(const FormulaRow<Formula>& row) {
      pair_loss<decltype(formula), Formula, N><<<1, 1>>>(formula, row.defaults, 0.1, columns);
    });
  });
  for_each_value_formula(
      [&](auto formula) { value_loss<decltype(formula), N><<<1, 1>>>(formula, columns); });
  for_each_kl_form([&]<class Form>(const FormulaRow<Form>& row) {
    kl_form<Form, N><<<1, 1>>>(row.defaults, KlCorrection::ratio,
                               weight_bounds(kWeightSaturation<float>, 10), 0.5, columns);
  });
  functions<N><<<1, 1>>>(columns);
}

}  // namespace

void instantiate_formulas(const Columns& columns, const Float16* in, BFloat16* out) {
  instantiate<1>(columns);
  instantiate<2>(columns);
  for_each_weight([&](const auto& row) { weight<<<1, 1>>>(row.defaults, columns); });
  halves<<<1, 1>>>(in, out);
}

}  // namespace tether
