"""What the numbers in arrays must be, in the same words on both paths; what does not count may be
anything."""

import math

import pytest
import tether
import torch
from paths import on_both_paths

MASK = torch.tensor([[1.0, 1.0, 1.0], [0.0, 1.0, 1.0], [0.0, 0.0, 0.0], [1.0, 1.0, 1.0]])
LOGPS = torch.full((4, 3), -1.0)
OFFSETS = torch.tensor([0, 3, 5, 5, 8])


def pairs(**arrays):
    return tether.preference_loss(LOGPS, LOGPS, MASK, **arrays)


def answers(**arrays):
    return tether.preference_loss(LOGPS, LOGPS, MASK, objective="kto", **arrays)


def as_many_rows(**arrays):
    """Rows of two tokens and of none: as many as tokens."""
    offsets = torch.tensor([0, 2, 2])
    mask = torch.tensor([0.0, 1.0])
    return tether.preference_loss(
        LOGPS[0, :2], LOGPS[0, :2], mask, objective="kto", offsets=offsets, **arrays
    )


def gae(**arrays):
    return tether.generalized_advantage_estimation(LOGPS, LOGPS, MASK, **arrays)


def packed_gae(lambdas, **arrays):
    tokens = LOGPS[MASK != 0]
    return tether.generalized_advantage_estimation(
        tokens, tokens, torch.ones(8), offsets=OFFSETS, lambdas=lambdas
    )


def turns(turn_ids):
    return tether.policy_loss(
        LOGPS, torch.ones(4), MASK, old_logps=LOGPS, level="turn_mean", turn_ids=turn_ids
    )


def packed_turns(turn_ids):
    tokens = LOGPS[MASK != 0]
    return tether.policy_loss(
        tokens,
        torch.ones(4),
        torch.ones(8),
        offsets=OFFSETS,
        old_logps=tokens,
        level="turn_mean",
        turn_ids=turn_ids,
    )


def moments(response_mask):
    return tether.moments(LOGPS, response_mask)


def mismatch(response_mask):
    return tether.mismatch_report(LOGPS, LOGPS, response_mask)


IN_ROWS = [[0, 0, 1], [9, 0, 0], [7, 3, 1], [1, 1, 2]]
UNIT = "in [0, 1]"
BAD = [
    (pairs, "answer_weights", [1.0, -1.0, 1.0, 1.0], "at least 0 and finite, got -1 at [1]"),
    (pairs, "answer_weights", [1.0, 1.0, math.inf, 1.0], "at least 0 and finite, got inf at [2]"),
    (answers, "labels", [1.0, 2.0, 0.0, 0.0], f"{UNIT}, got 2 at [1]"),
    (gae, "lambdas", [1.0, 1.5, 1.0, 1.0], f"{UNIT}, got 1.5 at [1]"),
    (gae, "lambdas", [*MASK[:3].tolist(), [1.0, -1.0, 1.0]], f"{UNIT}, got -1 at [3, 1]"),
    (packed_gae, "lambdas", [1.0, 1.0, 1.0, math.nan], f"{UNIT}, got nan at [3]"),
    (packed_gae, "lambdas", [1.0, 2.0] + 6 * [1.0], f"{UNIT}, got 2 at [1]"),
    (
        turns,
        "turn_ids",
        [*IN_ROWS[:3], [1, 2, 1]],
        "not decrease along a row, got 1 after 2 at [3, 2]",
    ),
    (
        packed_turns,
        "turn_ids",
        [3, 3, 3, 0, 1, 1, 1, 0],
        "not decrease along a row, got 0 after 1 at [7]",
    ),
    (
        turns,
        "turn_ids",
        [*IN_ROWS[:3], [2**62, -(2**63) + 1, 3]],
        f"not decrease along a row, got {-(2**63) + 1} after {2**62} at [3, 1]",
    ),
    (as_many_rows, "labels", [7.0, 1.0], f"{UNIT}, got 7 at [0]"),
    (moments, "response_mask", [[1.0, 2.0, 0.0], *MASK[1:].tolist()], f"{UNIT}, got 2 at [0, 1]"),
    (
        mismatch,
        "response_mask",
        [[1.0, -1.0, 0.0], *MASK[1:].tolist()],
        f"{UNIT}, got -1 at [0, 1]",
    ),
]
NAMES = {
    pairs: "preference_loss",
    answers: "preference_loss",
    as_many_rows: "preference_loss",
    gae: "generalized_advantage_estimation",
    packed_gae: "generalized_advantage_estimation",
    turns: "policy_loss",
    packed_turns: "policy_loss",
    moments: "moments",
    mismatch: "mismatch_report",
}


@pytest.mark.parametrize(("function", "array", "numbers", "message"), BAD)
def test_bad_numbers_are_refused(function, array, numbers, message, monkeypatch):
    def run():
        with pytest.raises(ValueError) as error:
            function(**{array: torch.tensor(numbers)})
        return str(error.value)

    want = f"{NAMES[function]}: {array} must {'' if 'not' in message else 'be '}{message}"
    assert on_both_paths(run, monkeypatch) == [want] * 2


def first_number(result):
    return result if isinstance(result, torch.Tensor) else torch.as_tensor(result[0])


@pytest.mark.parametrize(
    ("function", "array", "numbers"),
    [
        (answers, "labels", [1.0, 0.0, math.nan, 0.0]),
        (answers, "answer_weights", [1.0, 0.5, -3.0, 2.0]),
        (gae, "lambdas", [1.0, 0.5, math.nan, 0.0]),
        (gae, "lambdas", [*MASK[:1].tolist(), [7.0, 1.0, 0.0], [9.0] * 3, *MASK[3:].tolist()]),
        (packed_gae, "lambdas", [1.0, 0.5, 9.0, 0.0]),
        (as_many_rows, "labels", [1.0, math.nan]),
        (turns, "turn_ids", IN_ROWS),
        (turns, "turn_ids", [*IN_ROWS[:3], [-(2**63), 2**63 - 1, 2**63 - 1]]),
    ],
)
def test_what_does_not_count_may_be_anything(function, array, numbers, monkeypatch):
    given = {array: torch.tensor(numbers)}
    if array == "answer_weights":
        given["labels"] = torch.tensor([1.0, 0.0, 0.0, 1.0])
    one, other = on_both_paths(lambda: first_number(function(**given)), monkeypatch)
    assert torch.isfinite(one).all()
    assert torch.allclose(one, other)


def test_flags_of_terms(monkeypatch):
    def run():
        with pytest.raises(TypeError) as error:
            tether.kl_terms(LOGPS, LOGPS, MASK, allow_biased_gradient=3)
        return str(error.value)

    message = "kl_terms: allow_biased_gradient must be a bool, got int"
    assert on_both_paths(run, monkeypatch) == [message] * 2


def test_a_shard_is_looked_at_before_the_device(monkeypatch):
    def run(function, *tensors):
        with pytest.raises(TypeError) as error:
            function(*tensors, shard=3)
        return str(error.value)

    ids = torch.tensor([0, 1])
    for name, tensors in {
        "token_logps": (torch.zeros(2, 4), ids),
        "linear_token_logps": (torch.zeros(2, 3), torch.zeros(4, 3), ids),
    }.items():
        call = getattr(tether, name)
        message = f"{name}: shard must be a VocabularyShard, got int"
        assert on_both_paths(lambda c=call, t=tensors: run(c, *t), monkeypatch) == [message] * 2
