"""Advantages and returns. Constants all: nothing here has a gradient."""

from __future__ import annotations

import copy
from collections.abc import Hashable, Iterable, Mapping, Set
from numbers import Integral
from typing import NamedTuple

import torch
from torch import Tensor

from tether import _cuda, reference
from tether._checks import check_given, check_known, kind_of
from tether._functions import ADVANTAGES, FUNCTIONS, Call
from tether._lists import Choice, Numbers, Option, Value, checked_settings, of_numbers
from tether._ops import has_kernel


class AdvantagesAndReturns(NamedTuple):
    advantages: Tensor  # like rewards, in their dtype; 0 at masked slots
    returns: Tensor  # what a value head learns: of GAE advantages + values, of groups the rewards


class AdvantageEstimator(NamedTuple):
    """A recursion over the tokens of a row, or a rule of groups."""

    function: str  # advantage or group_advantage
    name: str
    formula: str
    paper: str
    agreement: str  # who computes the same in the tests
    options: dict[str, Option]
    choices: dict[str, Choice]

    @property
    def of_groups(self) -> bool:
        return self.function == "group_advantage"


# How answers are told to belong together: a size, ids or labels.
Groups = Tensor | int | Iterable[Hashable]

_CATALOGUE = {row[1]: AdvantageEstimator(*row, *rest) for row, *rest in ADVANTAGES}
_CALLEES = {
    name: FUNCTIONS[row.function].naming(group_ids="groups") for name, row in _CATALOGUE.items()
}


def advantages() -> dict[str, AdvantageEstimator]:
    """Every estimator by name, for `advantage`, with its formula, paper, options and choices."""
    return copy.deepcopy(_CATALOGUE)


def advantage(
    estimator: str,
    rewards: Numbers,
    response_mask: Tensor | None = None,
    *,
    values: Tensor | None = None,
    bootstrap: Numbers | None = None,
    done: Tensor | None = None,
    truncated: Tensor | None = None,
    truncation_values: Tensor | None = None,
    lambdas: Numbers | None = None,
    log_ratios: Tensor | None = None,
    offsets: Numbers | None = None,
    groups: Groups | None = None,
    lengths: Numbers | None = None,
    **options: Value,
) -> AdvantagesAndReturns:
    """Advantages and returns by any estimator of `tether.advantages()`.

    options are the options and choices of its row, gamma=0.99, lambda_=0.95, gap="decay". What an
    estimator does not read is not looked at. In float64 inside; on CUDA by kernels where the
    package has them (docs/cuda.md), of other devices than the CPU by torch's operations, which wait
    for nothing. Raises ValueError or TypeError before any work is done.

    A recursion ("gae") takes tokens, [B, T] or packed [N] with offsets:

    rewards, values    like each other; what the estimator does not read may be absent
    response_mask      slots that are 0 may hold anything and come out as 0
    bootstrap          [B], the value after the last token; None: 0
    done, truncated    bool: the episode ends at this token; it is cut off, and the value after it
                       is truncation_values
    lambdas            [B] or like rewards, in place of the option lambda_
    log_ratios         log pi(token) - log mu(token) [nats], mu the policy that sampled it

    A rule of groups ("rloo") takes one reward a sequence:

    rewards            [B], a list or an array of numpy too; they are the returns too
    groups             how many consecutive rewards belong together, the answers to one prompt; ids
                       [B], int32 or int64, in any order; or labels of any kind, a list or an
                       array, as strings
    lengths            [B], tokens of each answer, for rules that need them
    """
    function = "advantage"
    check_known(function, "estimator", estimator, _CATALOGUE)
    of_rows = {
        "response_mask": response_mask,
        "values": values,
        "bootstrap": bootstrap,
        "done": done,
        "truncated": truncated,
        "truncation_values": truncation_values,
        "lambdas": lambdas,
        "log_ratios": log_ratios,
        "offsets": offsets,
    }
    of_groups = {"groups": groups, "lengths": lengths}
    grouped = _CATALOGUE[estimator].of_groups
    for name, each in (of_rows if grouped else of_groups).items():
        if each is not None:
            kind = "a rule of groups" if grouped else "a recursion"
            raise ValueError(f"{function}: {name} must not be given for {estimator}, {kind}")
    if grouped:
        rewards = _rewards_of(rewards, groups)
        out = _of_groups(function, estimator, rewards, groups, lengths, options)
        return AdvantagesAndReturns(out, rewards)
    return _of_rows(function, estimator, {"rewards": rewards, **of_rows}, options)


def _of_rows(
    function: str,
    estimator: str,
    tensors: Mapping[str, Tensor | None],
    options: Mapping[str, Value],
) -> AdvantagesAndReturns:
    call = _call(function, estimator, tensors, options).detached()
    on_cuda = _cuda.call_on_cuda(call)
    if on_cuda is None and not has_kernel(tensors["rewards"]):
        call.check_settings()
        out = reference.advantage(**call.tensors, **call.named_settings())
        return AdvantagesAndReturns(*out)
    return AdvantagesAndReturns(*(on_cuda or call).run())


def _of_groups(
    function: str,
    estimator: str,
    rewards: Tensor,
    groups: Groups | None,
    lengths: Numbers | None,
    options: Mapping[str, Value],
) -> Tensor:
    check_given(f"{function}: rewards", rewards)
    ids = _ids_of(function, groups, rewards)
    lengths = of_numbers(lengths, "counts", rewards)
    tensors = {"rewards": rewards, "groups": ids, "lengths": lengths}
    call = _call(function, estimator, tensors, options)
    if ids is None:
        call = call.with_numbers({"group_size": int(groups)})
    on_cuda = _cuda.call_on_cuda(call.detached())
    if on_cuda is None and not has_kernel(rewards):
        return _of_groups_by_torch(function, call.detached(), groups)

    there = on_cuda or call.detached()
    number = torch.float32 if on_cuda else torch.float64
    types = {"rewards": number, "groups": torch.int64, "lengths": number}
    for name, each in there.tensors.items():
        there.tensors[name] = None if each is None else each.to(types[name]).contiguous()
    return there.run().to(rewards)


def _of_groups_by_torch(function: str, call: Call, groups: Groups | None) -> Tensor:
    """On other devices, without waiting: numbers are not looked at."""
    call.check_settings()
    rewards, ids, lengths = call.tensors.values()
    if ids is None:
        count, size = len(rewards), int(groups)
        if count % size:
            raise ValueError(
                f"{function}: rewards must divide into groups of {size}, got {count}. Pass group "
                "ids for ragged groups"
            )
        ids = torch.arange(count, device=rewards.device) // size
    options = {"nan_reward": "error", **call.named_settings()}
    options.pop("group_size", None)
    return reference.group_advantage(rewards, ids, lengths=lengths, **options)


def _rewards_of(rewards: Numbers, groups: Groups | None) -> Tensor:
    """A list or an array lies beside the ids."""
    made = of_numbers(rewards, "floating")
    if made is rewards or not isinstance(groups, Tensor):
        return made
    return made.to(groups.device)


def ids_of_labels(labels: Iterable[Hashable]) -> Tensor:
    """[B]: 0, 1, ... as they first appear."""
    known: dict[Hashable, int] = {}
    numbers = (each.item() if isinstance(each, Tensor) else each for each in labels)
    return torch.tensor(
        [known.setdefault(each, len(known)) for each in numbers], dtype=torch.int64, device="cpu"
    )


def _ids_of(function: str, groups: Groups | None, rewards: Tensor) -> Tensor | None:
    """None of a size."""
    if isinstance(groups, Tensor):
        return groups
    if groups is None:
        raise ValueError(f"{function}: groups must be given, got none")
    if isinstance(groups, Integral) and not isinstance(groups, bool):
        _check_size(function, int(groups))
        return None
    what = "a size, a tensor of ids or labels"
    unordered = isinstance(groups, (str, bytes, Set, Mapping))
    single = getattr(groups, "shape", None) == ()  # an array of one, which is iterable by its class
    if unordered or single or not isinstance(groups, Iterable):
        raise TypeError(f"{function}: groups must be {what}, got {kind_of(groups)}")
    labels = list(groups)
    for each in labels:
        if isinstance(each, Tensor) and each.numel() != 1:
            got = f"one that is a tensor {list(each.shape)}"
            raise TypeError(f"{function}: groups must be {what}, got {got}")
    try:
        ids = ids_of_labels(labels)
    except TypeError:
        raise TypeError(f"{function}: groups must be {what}, got one without a hash") from None
    if any(each != each for each in labels):  # and so in a group with no other
        raise ValueError(f"{function}: groups must be {what}, got NaN as one")
    return ids.to(rewards.device, non_blocking=True)


def _check_size(function: str, groups: int) -> None:
    if not 1 <= groups <= 2**53:
        rule = "at least 1" if groups < 1 else f"at most {2**53}"
        raise ValueError(f"{function}: groups must be {rule}, got {groups}")


def _call(
    function: str,
    estimator: str,
    tensors: Mapping[str, Tensor | None],
    options: Mapping[str, Value],
) -> Call:
    row, callee = _CATALOGUE[estimator], _CALLEES[estimator]
    checked = callee.checked(tensors, function)
    settings = checked_settings(function, row.options, row.choices, options)
    choices = {"estimator": estimator, **settings.choices}
    return Call(callee, checked, settings._replace(choices=choices), caller=function)


# ---- by name -------------------------------------------------------------------------------------


def generalized_advantage_estimation(
    rewards: Tensor,
    values: Tensor,
    response_mask: Tensor,
    *,
    gamma: float = 1.0,
    lambda_: float = 1.0,
    gap: str = "carry",
    bootstrap: Numbers | None = None,
    done: Tensor | None = None,
    truncated: Tensor | None = None,
    truncation_values: Tensor | None = None,
    lambdas: Numbers | None = None,
    offsets: Numbers | None = None,
) -> AdvantagesAndReturns:
    """A_t = delta_t + gamma lambda A_{t+1}, delta_t = r_t + gamma V_{t+1} - V_t; returns A + V.

    Schulman et al. 2015, arXiv:1506.02438, eq. 16.

    rewards, values    [B, T], or packed [N] with offsets
    response_mask      like rewards; slots that are 0 may hold anything and come out as 0
    gap                over masked slots between tokens: "carry", nothing passes; "decay", each is a
                       step without reward
    bootstrap          [B], the value after the last token; None: 0
    done, truncated    like rewards, bool: the episode ends at this token; it is cut off, and the
                       value after it is truncation_values, like rewards
    lambdas            [B] or like rewards, goes before lambda_

    In float64 inside; on CUDA by kernels where the package has them (docs/cuda.md), of other
    devices than the CPU by torch's operations, which wait for nothing.
    """
    tensors = {
        "rewards": rewards,
        "values": values,
        "response_mask": response_mask,
        "bootstrap": bootstrap,
        "done": done,
        "truncated": truncated,
        "truncation_values": truncation_values,
        "lambdas": lambdas,
        "offsets": offsets,
    }
    options = {"gamma": gamma, "lambda_": lambda_, "gap": gap}
    return _of_rows("generalized_advantage_estimation", "gae", tensors, options)


def discounted_returns(
    rewards: Tensor,
    response_mask: Tensor,
    *,
    gamma: float = 1.0,
    gap: str = "carry",
    bootstrap: Numbers | None = None,
    offsets: Numbers | None = None,
) -> Tensor:
    """G_t = r_t + gamma G_{t+1}, with G = bootstrap [B] after the last token; 0 at masked slots.

    rewards [B, T], or packed [N] with offsets; `gap` as in generalized_advantage_estimation.
    """
    tensors = {
        "rewards": rewards,
        "response_mask": response_mask,
        "bootstrap": bootstrap,
        "offsets": offsets,
    }
    return _of_rows("discounted_returns", "returns", tensors, {"gamma": gamma, "gap": gap}).returns


def group_advantage(
    rewards: Numbers,
    groups: Groups,
    *,
    baseline: str = "mean",
    scale: str = "group_std",
    epsilon: float = 1e-6,
    nan_reward: str = "error",
) -> Tensor:
    """(r - baseline) / (scale + epsilon), one reward per sequence; [B] in the dtype of the rewards.

    groups      how many consecutive rewards belong together, the answers to one prompt; ids [B],
                int32 or int64, in any order; or labels of any kind, a list or an array, as strings
    baseline    "mean" of the group (GRPO), "leave_one_out" (RLOO), "best_of_others" (pass@k: what
                an answer adds to the best of its group), "none"
    scale       "group_std" (GRPO), "batch_std", both with N - 1; "group_mean" (MaxRL: 0 where the
                mean is not above 0), "none" (Dr. GRPO, RLOO)
    nan_reward  "error", or "missing": 0, and the group is as if it were absent

    With a baseline, equal rewards give exactly 0, and so does a group of one.
    """
    options = {
        "baseline": baseline,
        "scale": scale,
        "epsilon": epsilon,
        "nan_reward": nan_reward,
    }
    rewards = _rewards_of(rewards, groups)
    return _of_groups("group_advantage", "grpo", rewards, groups, None, options)
