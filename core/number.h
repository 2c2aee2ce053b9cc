#pragma once

// The number world: what a formula may do with its numbers.
//
// A formula is written once, as a template over `Number`, and instantiated on
//   Dual<T, N>     a value and N derivatives in one pass (T = float, double, a wider type in tests)
//   Dual<T, 0>     a constant: the value alone
//   TensorNumber   LibTorch autograd on any device (libtorch/tensor_number.h)
// and never on a bare float or double: argument-dependent look-up finds the functions below only
// for a number of ours, and the tie and saturation rules live in them.
//
// One rule at ties and kinks, for every number:
//   min(a, b), max(a, b)   take a
//   clamp(x, low, high)    passes the gradient on the closed interval [low, high]
//   abs(x)                 has derivative 0 at 0
// One rule for runaways: exp(x) and expm1_minus(x) saturate (kSaturation): the value stays finite
// and the derivative is the one at the bound, not 0, so that a token that ran away is still pulled
// back. NaN in, NaN out.

#include <type_traits>
#include <utility>

#include "macros.h"
#include "math.h"

namespace tether {

// |x| beyond this enters exp as this: e^60 * 1e12 is still a float.
template <class T>
inline constexpr T kSaturation = T(600);
template <>
inline constexpr float kSaturation<float> = 60.0f;

// N derivatives. One is a plain number, none is nothing at all.
template <class T, int N>
struct Derivatives {
  T each[N] = {};

  TETHER_INLINE constexpr T& operator[](int i) { return each[i]; }
  TETHER_INLINE constexpr const T& operator[](int i) const { return each[i]; }
  TETHER_INLINE friend Derivatives operator+(Derivatives a, const Derivatives& b) {
    for (int i = 0; i < N; ++i) a[i] += b[i];
    return a;
  }
  TETHER_INLINE friend Derivatives operator-(Derivatives a) {
    for (int i = 0; i < N; ++i) a[i] = -a[i];
    return a;
  }
  TETHER_INLINE friend Derivatives operator*(Derivatives a, const T& scale) {
    for (int i = 0; i < N; ++i) a[i] *= scale;
    return a;
  }
};

struct NoDerivative {
  TETHER_INLINE friend NoDerivative operator+(NoDerivative a, NoDerivative) { return a; }
  TETHER_INLINE friend NoDerivative operator-(NoDerivative a) { return a; }
  template <class T>
  TETHER_INLINE friend NoDerivative operator*(NoDerivative a, const T&) {
    return a;
  }
  template <class Gradient>
  TETHER_INLINE friend Gradient operator+(const Gradient& a, NoDerivative)
    requires(!std::is_same_v<Gradient, NoDerivative>)
  {
    return a;
  }
  template <class Gradient>
  TETHER_INLINE friend Gradient operator+(NoDerivative, const Gradient& b)
    requires(!std::is_same_v<Gradient, NoDerivative>)
  {
    return b;
  }
};

template <class T, int N>
using Gradient =
    std::conditional_t<N == 0, NoDerivative, std::conditional_t<N == 1, T, Derivatives<T, N>>>;

template <class T, int N = 1>
struct Dual {
  T value;
  Gradient<T, N> grad{};
};

// A constant. Its derivative takes no room, so that arrays of constants vectorise.
template <class T>
struct Dual<T, 0> {
  T value;
  [[no_unique_address]] NoDerivative grad{};

  // A constant where a number with a derivative is wanted.
  TETHER_INLINE operator Dual<T, 1>() const { return {value, T(0)}; }
};

template <class T>
using Constant = Dual<T, 0>;

namespace detail {

template <int N, int M>
inline constexpr int kJoined = N > M ? N : M;

template <class T, int N>
TETHER_INLINE Dual<T, N> make(T value, const Gradient<T, N>& grad) {
  if constexpr (N == 0) {
    return {value};
  } else {
    return {value, grad};
  }
}

// The same derivatives, seen as N of them.
template <class T, int N, int M>
TETHER_INLINE Gradient<T, N> widen(const Gradient<T, M>& grad) {
  static_assert(N == M || M == 0, "numbers with different counts of derivatives do not mix");
  if constexpr (N == M) {
    return grad;
  } else {
    return Gradient<T, N>{};
  }
}

template <class T, int N>
TETHER_INLINE Gradient<T, N> choose(bool condition, const Gradient<T, N>& a,
                                    const Gradient<T, N>& b) {
  if constexpr (N == 0) {
    return a;
  } else if constexpr (N == 1) {
    return condition ? a : b;
  } else {
    Gradient<T, N> out;
    for (int i = 0; i < N; ++i) out[i] = condition ? a[i] : b[i];
    return out;
  }
}

}  // namespace detail

// ---- arithmetic; a double is an option of the formula, cast once -------------------------------

template <class T, int N, int M>
TETHER_INLINE auto operator+(const Dual<T, N>& a, const Dual<T, M>& b) {
  return detail::make<T, detail::kJoined<N, M>>(a.value + b.value, a.grad + b.grad);
}
template <class T, int N>
TETHER_INLINE Dual<T, N> operator-(const Dual<T, N>& a) {
  return detail::make<T, N>(-a.value, -a.grad);
}
template <class T, int N, int M>
TETHER_INLINE auto operator-(const Dual<T, N>& a, const Dual<T, M>& b) {
  return detail::make<T, detail::kJoined<N, M>>(a.value - b.value, a.grad + (-b.grad));
}
template <class T, int N, int M>
TETHER_INLINE auto operator*(const Dual<T, N>& a, const Dual<T, M>& b) {
  return detail::make<T, detail::kJoined<N, M>>(a.value * b.value,
                                                a.grad * b.value + b.grad * a.value);
}
template <class T, int N, int M>
TETHER_INLINE auto operator/(const Dual<T, N>& a, const Dual<T, M>& b) {
  const T inverse = T(1) / b.value;
  const T quotient = a.value / b.value;
  return detail::make<T, detail::kJoined<N, M>>(quotient,
                                                (a.grad + b.grad * (-quotient)) * inverse);
}

template <class T, int N>
TETHER_INLINE Dual<T, N> operator+(const Dual<T, N>& a, double b) {
  return detail::make<T, N>(a.value + T(b), a.grad);
}
template <class T, int N>
TETHER_INLINE Dual<T, N> operator+(double a, const Dual<T, N>& b) {
  return b + a;
}
template <class T, int N>
TETHER_INLINE Dual<T, N> operator-(const Dual<T, N>& a, double b) {
  return detail::make<T, N>(a.value - T(b), a.grad);
}
template <class T, int N>
TETHER_INLINE Dual<T, N> operator-(double a, const Dual<T, N>& b) {
  return detail::make<T, N>(T(a) - b.value, -b.grad);
}
template <class T, int N>
TETHER_INLINE Dual<T, N> operator*(const Dual<T, N>& a, double b) {
  return detail::make<T, N>(a.value * T(b), a.grad * T(b));
}
template <class T, int N>
TETHER_INLINE Dual<T, N> operator*(double a, const Dual<T, N>& b) {
  return b * a;
}
template <class T, int N>
TETHER_INLINE Dual<T, N> operator/(const Dual<T, N>& a, double b) {
  return detail::make<T, N>(a.value / T(b), a.grad * (T(1) / T(b)));
}
template <class T, int N>
TETHER_INLINE Dual<T, N> operator/(double a, const Dual<T, N>& b) {
  return Constant<T>{T(a)} / b;
}

// ---- comparison gives the condition of a select ------------------------------------------------

template <class T, int N, int M>
TETHER_INLINE bool operator<(const Dual<T, N>& a, const Dual<T, M>& b) {
  return a.value < b.value;
}
template <class T, int N, int M>
TETHER_INLINE bool operator>(const Dual<T, N>& a, const Dual<T, M>& b) {
  return a.value > b.value;
}
template <class T, int N>
TETHER_INLINE bool operator<(const Dual<T, N>& a, double b) {
  return a.value < T(b);
}
template <class T, int N>
TETHER_INLINE bool operator>(const Dual<T, N>& a, double b) {
  return a.value > T(b);
}

// a where the condition holds, else b. Both are computed; the other one may be anything, NaN too.
template <class T, int N, int M>
TETHER_INLINE auto select(bool condition, const Dual<T, N>& a, const Dual<T, M>& b) {
  constexpr int K = detail::kJoined<N, M>;
  return detail::make<T, K>(condition ? a.value : b.value,
                            detail::choose<T, K>(condition, detail::widen<T, K, N>(a.grad),
                                                 detail::widen<T, K, M>(b.grad)));
}

template <class T, int N, int M>
TETHER_INLINE auto min(const Dual<T, N>& a, const Dual<T, M>& b) {
  return select((b.value < a.value) | (b.value != b.value), b, a);
}
template <class T, int N, int M>
TETHER_INLINE auto max(const Dual<T, N>& a, const Dual<T, M>& b) {
  return select((b.value > a.value) | (b.value != b.value), b, a);
}
template <class T, int N>
TETHER_INLINE Dual<T, N> min(const Dual<T, N>& a, double b) {
  return min(a, Constant<T>{T(b)});
}
template <class T, int N>
TETHER_INLINE Dual<T, N> max(const Dual<T, N>& a, double b) {
  return max(a, Constant<T>{T(b)});
}
template <class T, int N>
TETHER_INLINE Dual<T, N> clamp(const Dual<T, N>& x, double low, double high) {
  return min(max(x, low), high);
}
template <class T, int N>
TETHER_INLINE Dual<T, N> abs(const Dual<T, N>& x) {
  if constexpr (N == 0) {
    return {x.value < T(0) ? -x.value : x.value};
  } else {
    return max(select(x.value == T(0), Constant<T>{x.value}, x), -x);
  }
}

// ---- gradients by hand -------------------------------------------------------------------------

// The value alone: a constant for everything that follows.
template <class T, int N>
TETHER_INLINE Constant<T> stop_gradient(const Dual<T, N>& x) {
  return {x.value};
}

// The type of constants beside such numbers.
template <class Number>
using ConstantOf = decltype(stop_gradient(std::declval<const Number&>()));

// Straight through: the value of one number with the gradient of another.
template <class T, int N, int M>
TETHER_INLINE Dual<T, M> with_gradient_of(const Dual<T, N>& value,
                                          const Dual<T, M>& gradient_source) {
  return detail::make<T, M>(value.value, gradient_source.grad);
}

// ---- functions ---------------------------------------------------------------------------------

// e^x, saturated.
template <class T, int N>
TETHER_INLINE Dual<T, N> exp(const Dual<T, N>& x) {
  const T value = math::exp(x.value, -kSaturation<T>, kSaturation<T>);
  return detail::make<T, N>(value, x.grad * value);
}

// The chance e^x of an event, x <= 0, and that of all others, 1 - e^x, neither by a difference that
// cancels. Derivatives e^x and -e^x; saturated below.
template <class Number>
struct Chances {
  Number own, others;
};

template <class T, int N>
TETHER_INLINE Chances<Dual<T, N>> chances(const Dual<T, N>& x) {
  const auto both = math::exp_and_one_minus(x.value, -kSaturation<T>);
  return {detail::make<T, N>(both.exp, x.grad * both.exp),
          detail::make<T, N>(both.one_minus, -(x.grad * both.exp))};
}

// e^x - 1, saturated above (below it is -1 to the last bit).
template <class T, int N>
TETHER_INLINE Dual<T, N> expm1(const Dual<T, N>& x) {
  const T slope = math::exp(x.value, -kSaturation<T>, kSaturation<T>);
  return detail::make<T, N>(math::expm1(x.value, kSaturation<T>), x.grad * slope);
}

// e^x - 1 - x >= 0 without cancellation, saturated above. Derivative e^x - 1.
template <class T, int N>
TETHER_INLINE Dual<T, N> expm1_minus(const Dual<T, N>& x) {
  return detail::make<T, N>(math::expm1_minus(x.value, kSaturation<T>),
                            x.grad * math::expm1(x.value, kSaturation<T>));
}

template <class T, int N>
TETHER_INLINE Dual<T, N> log(const Dual<T, N>& x) {
  return detail::make<T, N>(math::log(x.value), x.grad * (T(1) / x.value));
}

// log(a / b) of numbers of about the range of chances, positive and not tiny (core/math.h).
template <class T, int N>
TETHER_INLINE Dual<T, N> log_quotient(const Dual<T, N>& a, const Dual<T, N>& b) {
  return detail::make<T, N>(math::log_quotient(a.value, b.value),
                            a.grad * (T(1) / a.value) + -(b.grad * (T(1) / b.value)));
}

template <class T, int N>
TETHER_INLINE Dual<T, N> log1p(const Dual<T, N>& x) {
  return detail::make<T, N>(math::log1p(x.value), x.grad * (T(1) / (T(1) + x.value)));
}

// 1 / (1 + e^-x). Derivative sigmoid(x) sigmoid(-x).
template <class T, int N>
TETHER_INLINE Dual<T, N> sigmoid(const Dual<T, N>& x) {
  const T value = math::sigmoid(x.value);
  return detail::make<T, N>(value, x.grad * (value * math::sigmoid(-x.value)));
}

// log sigmoid(x). Derivative sigmoid(-x).
template <class T, int N>
TETHER_INLINE Dual<T, N> log_sigmoid(const Dual<T, N>& x) {
  return detail::make<T, N>(math::log_sigmoid(x.value), x.grad * math::sigmoid(-x.value));
}

// log(1 - e^x) for x < 0. Derivative -1 / (e^-x - 1).
template <class T, int N>
TETHER_INLINE Dual<T, N> log1mexp(const Dual<T, N>& x) {
  return detail::make<T, N>(math::log1mexp(x.value), x.grad * (T(-1) / math::expm1(-x.value)));
}

}  // namespace tether
