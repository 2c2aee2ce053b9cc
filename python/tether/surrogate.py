"""A surrogate of one's own, written on tensors, in the place of an objective's."""

from __future__ import annotations

import functools
import inspect
import keyword
import math
import sys
from collections.abc import Callable

from torch import Tensor

from tether._catalogue import FAMILIES, KNOWN_DIALECTS, KNOWN_WEIGHTS
from tether._checks import check_known, kind_of, parameters_of
from tether._functions import FUNCTIONS
from tether._lists import Option, check_range
from tether.reference.objectives import OBJECTIVES, Row
from tether.reference.surrogate import Formula, Token

__all__ = ["Surrogate", "Token"]

_ANY_NUMBER = Option(math.nan, -math.inf, math.inf, False, "a number")


class Surrogate:
    """A formula of one token's loss as an objective, `objective=` of the policy losses.

        @tether.Surrogate
        def clipped(token: tether.Token, epsilon: float = 0.2) -> torch.Tensor:
            bounded = token.ratio.clamp(1 - epsilon, 1 + epsilon)
            return -torch.minimum(token.ratio * token.advantage, bounded * token.advantage)

        tether.policy_loss(logps, advantages, response_mask, objective=clipped, epsilon=0.3)

    formula     takes a `Token`, tensors of one shape, and returns the loss S of each, to be
                minimised: the sign is its own. Of each token alone, no sums over tokens. The
                gradient is autograd's; `detach()` stops it. It is called twice: for the loss, and
                for the slope that says which tokens are clipped, those where it is 0. In masked
                slots it sees an ordinary token, and what it returns there is not used. Further
                parameters, with numbers as defaults, are options of the objective
    like        the row of `objectives()` or `dialects()` whose level, aggregation, penalty and
                weights it has unless said
    truncation  (low, high), numbers or names of options: the ratios whose weight it takes as it is.
                Beyond, a token counts as clipped although it keeps a gradient

    It runs by torch's operations on every device. ValueError or TypeError for a formula whose
    parameters are something else.
    """

    def __init__(
        self,
        formula: Callable[..., Tensor],
        *,
        like: str = "ppo",
        truncation: tuple[float | str, float | str] = (0.0, math.inf),
    ) -> None:
        self._names, self.defaults = _options_of(formula)
        functools.update_wrapper(self, formula, updated=())
        self.formula = formula
        self.like = _checked_like(like)
        beneath = KNOWN_DIALECTS.get(like)
        row = FAMILIES["policy"][beneath.objective if beneath else like]
        own = OBJECTIVES[row.name]
        options = {k: v for k, v in row.options.items() if k not in own.surrogate_options}
        _check_free(self.defaults, {*options, *row.choices})
        _check_truncation(truncation, self.defaults)
        of_formula = {k: _ANY_NUMBER._replace(default=v) for k, v in self.defaults.items()}
        self.row = row._replace(
            formula=inspect.getdoc(formula) or "",
            paper="",
            agreement="",
            options=of_formula | options,
        )
        known = {**options, **row.choices}
        self.settings = {
            k: v for k, v in (beneath.options if beneath else {}).items() if k in known
        }
        self.weights = beneath.weights if beneath else {}
        self.reference: Row = own._replace(
            surrogate=Formula(self._by_names, truncation), surrogate_options=self.defaults
        )

    def __reduce_ex__(self, protocol: int) -> str | tuple:
        """As the name that a decorated function has in its module, or by its parts."""
        found = sys.modules.get(self.__module__)
        for part in self.__qualname__.split("."):
            found = getattr(found, part, None)
        return self.__qualname__ if found is self else super().__reduce_ex__(protocol)

    def __call__(self, token: Token, /, **options: float | Tensor) -> Tensor:
        """The formula itself."""
        return self.formula(token, **options)

    def _by_names(self, token: Token, /, **values: float | Tensor) -> Tensor:
        return self.formula(token, **{self._names[name]: each for name, each in values.items()})


def _checked_like(like: str) -> str:
    of_dialects = isinstance(like, str) and "." in like
    check_known("Surrogate", "like", like, KNOWN_DIALECTS if of_dialects else FAMILIES["policy"])
    return like


def _options_of(formula: Callable[..., Tensor]) -> tuple[dict[str, str], dict[str, float]]:
    """The parameters behind the token by the names of options, and the defaults by the same."""
    token, *rest = parameters_of("Surrogate: formula", formula) or [None]
    by_place = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    if token is None or token.kind not in by_place:
        raise ValueError(
            f"Surrogate: formula must take a token first, got {token or 'no parameter'}"
        )
    names, defaults = {}, {}
    for each in rest:
        if each.kind not in (
            inspect.Parameter.POSITIONAL_OR_KEYWORD,
            inspect.Parameter.KEYWORD_ONLY,
        ):
            raise ValueError(f"Surrogate: formula must name its options, got {each}")
        if each.default is inspect.Parameter.empty:
            raise ValueError(f"Surrogate: option {each.name} must have a default, got none")
        check_range("Surrogate", f"option {each.name}", each.default, _ANY_NUMBER)
        short = each.name[:-1]
        name = short if keyword.iskeyword(short) else each.name
        names[name], defaults[name] = each.name, each.default
    return names, defaults


def _check_free(options: dict[str, float], of_objective: set[str]) -> None:
    arguments = {each.name for each in FUNCTIONS["policy_loss"].arguments}
    taken = {*arguments, *of_objective, *KNOWN_WEIGHTS}
    taken |= {"objective", "offsets", "normalizer", "weights"}
    for name in options:
        if name in taken:
            raise ValueError(
                f"Surrogate: option {name} must have another name: policy_loss has one"
            )


def _check_truncation(truncation: tuple[float | str, float | str], options: dict) -> None:
    if not isinstance(truncation, tuple) or len(truncation) != 2:
        got = truncation if isinstance(truncation, tuple) else kind_of(truncation)
        raise TypeError(f"Surrogate: truncation must be (low, high), got {got}")
    for end in truncation:
        if isinstance(end, str) and end not in options:
            known = ", ".join(options) or "no option"
            raise ValueError(f'Surrogate: truncation must be of {known}, got "{end}"')
        if not isinstance(end, str):
            check_range("Surrogate", "truncation", end, _ANY_NUMBER)
