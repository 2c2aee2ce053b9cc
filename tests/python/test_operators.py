"""Operators called directly stay inside their memory: every argument is checked or made contiguous.

Rows of (operator, arguments that are right, {place: one that is wrong}).
"""

import pytest
import tether
import torch
from tether._cuda import ON_DEVICE

OPS = torch.ops.tether
DOUBLE, LONG = torch.float64, torch.int64


def zeros(*shape, dtype=torch.float32):
    return torch.zeros(shape, dtype=dtype)


def spread(*shape, dtype=torch.float64):
    """Of stride 0, as what expand() gives."""
    return torch.zeros((), dtype=dtype).expand(shape)


ROWS, MASK = zeros(2, 3), torch.ones(2, 3)
LOGITS, TARGETS, STATISTICS = zeros(4, 8), zeros(4, dtype=LONG), zeros(4, 8, dtype=DOUBLE)
NONE = zeros(0, dtype=DOUBLE)
WORDS, OBJECTIVE = ([], NONE, [], []), ([], NONE, ["objective"], ["ppo"])
ALL = ([], NONE, ["entropies", "statistics"], ["true", "true"])
SHARD = (["ids"], torch.tensor([8.0], dtype=DOUBLE), *ALL[2:])
HEAD = (LOGITS, zeros(4, 2, dtype=LONG) + torch.arange(2), zeros(4, 2, dtype=DOUBLE) - 2)
SAMPLES = (TARGETS, zeros(4, dtype=DOUBLE) - 2)
WRONG_ROWS = (zeros(2, 2), zeros(3, 3), zeros(6), zeros(2, 3, dtype=LONG))
KEPT = torch.tensor([[0, -1], [-1, -1], [5, 0], [0, 0]])
WRONG_KEPT = (zeros(3, 2, dtype=LONG), KEPT.int(), KEPT + 7, KEPT - 2, spread(4, 2, dtype=LONG))
WRONG_IDS = (zeros(3, dtype=LONG), zeros(4, dtype=torch.int32), spread(4, dtype=LONG))
WRONG_DOUBLES = (zeros(3, dtype=DOUBLE), zeros(4), spread(4))
WRONG_STATISTICS = (zeros(3, 8, dtype=DOUBLE), zeros(4, 8), spread(4, 8))
FUNCTIONS = tether._functions.FUNCTIONS


def right(argument):
    """What an argument of a function's list may be, for 2 rows of 3 tokens."""
    shapes = {"per_row": (2,), "either": (2,), "answers": (2,)}
    if argument.kind == "ids":
        return zeros(2, dtype=LONG) if argument.name == "group_ids" else zeros(2, 3, dtype=LONG)
    if argument.kind == "counts" or argument.shape == "answers":
        return torch.ones(2, dtype=DOUBLE)
    dtype = torch.bool if argument.kind == "flags" else torch.float32
    return torch.ones(shapes.get(argument.shape, (2, 3)), dtype=dtype)


def wrong(argument):
    good = right(argument)
    types = (zeros(*good.shape, dtype=torch.complex64), zeros(*good.shape, dtype=torch.int16))
    sizes = (torch.ones(4, 5, 6, dtype=good.dtype), torch.ones(5, dtype=good.dtype))
    if argument.shape in ("elements", "answers"):
        return types + sizes[:1]
    return types + sizes


def call_of(function):
    words = WORDS
    if function.name in ("policy_loss", "local_counts"):
        words = OBJECTIVE
    elif function.name == "preference_loss":
        words = ([], NONE, ["objective"], ["kto"])
    elif function.name == "value_loss":
        words = ([], NONE, ["objective"], ["huber"])
    arguments = [right(each) for each in function.arguments]
    offsets = [None] if function.packed else []
    return (*arguments, *offsets, *words, *([True] if function.gradient else []))


def wrong_words(function):
    """Places of the words of a call, and what they may not be."""
    first = len(function.arguments) + function.packed
    return {first + 1: (spread(1), zeros(1)), first + 3: (["x"],)}


CALLS = {
    **{
        name: (
            call_of(function),
            {i: wrong(each) for i, each in enumerate(function.arguments)} | wrong_words(function),
        )
        for name, function in FUNCTIONS.items()
        if function.results
    },
    "check_settings": (("f", "moments", [], 0, *WORDS), {5: (spread(1), zeros(1))}),
    "policy_loss_of_logits": (
        (
            *(LOGITS.clone(), TARGETS, torch.tensor([0, 2, 3, 5]), zeros(2), MASK, ROWS, ROWS),
            *(ROWS, None, None, None, None, None, *OBJECTIVE, *ALL, True),
        ),
        {
            0: (spread(4, 8), zeros(8, 4).t(), zeros(4)),
            1: WRONG_IDS,
            2: (*WRONG_IDS, torch.tensor([0, 2, 3, 6]), torch.tensor([0, 0, 1, 2]), TARGETS - 1),
            3: (zeros(3),),
            5: WRONG_ROWS,
            6: WRONG_ROWS,
            7: WRONG_ROWS,
        },
    ),
    "policy_metrics": (
        (zeros(14, 2, dtype=DOUBLE), zeros(3, dtype=DOUBLE)),
        {0: (zeros(14, dtype=DOUBLE), zeros(14, 2)), 1: (zeros(2, dtype=DOUBLE), zeros(3))},
    ),
    "preference_metrics": (
        (zeros(9, 2, dtype=DOUBLE),),
        {0: (zeros(9, dtype=DOUBLE), zeros(9, 2))},
    ),
    "value_metrics": ((zeros(9, dtype=DOUBLE),), {0: (zeros(7, dtype=DOUBLE), zeros(9))}),
    "token_logps_forward": (
        (LOGITS, TARGETS, KEPT, *ALL),
        {0: (zeros(3, 8), zeros(4, 0), zeros()), 1: WRONG_IDS, 2: WRONG_KEPT},
    ),
    "token_statistics": ((STATISTICS, LOGITS, *WORDS), {0: WRONG_STATISTICS}),
    "token_logps_backward": (
        (LOGITS, TARGETS, KEPT, STATISTICS, *SAMPLES[1:], *SAMPLES[1:], *WORDS, zeros(4, 8)),
        {
            1: WRONG_IDS,
            2: WRONG_KEPT,
            3: WRONG_STATISTICS,
            4: WRONG_DOUBLES,
            5: WRONG_DOUBLES,
            10: (zeros(3, 8), zeros(4, 7), zeros(4, 8, dtype=DOUBLE)),
        },
    ),
    "shard_statistics": ((LOGITS, TARGETS, KEPT, *SHARD), {1: WRONG_IDS, 2: WRONG_KEPT}),
    "token_logps_of_shards": (
        (
            OPS.shard_statistics(LOGITS, TARGETS, None, *SHARD)[None],
            TARGETS,
            LOGITS,
            *SHARD,
        ),
        {
            0: (zeros(0, 5, 8, dtype=DOUBLE), zeros(1, 4, 8, dtype=DOUBLE), zeros(1, 5, 8)),
            1: WRONG_IDS,
        },
    ),
    "categorical_kl_forward": (
        (LOGITS, LOGITS, torch.ones(4, dtype=torch.bool), KEPT, *WORDS),
        {
            1: (zeros(3, 8), zeros(4, 7)),
            2: (zeros(4), torch.ones(3, dtype=torch.bool)),
            3: WRONG_KEPT,
        },
    ),
    "categorical_kl_backward": (
        (
            LOGITS,
            LOGITS,
            KEPT,
            zeros(4, 9, dtype=DOUBLE),
            zeros(4, 3, dtype=DOUBLE),
            *WORDS,
            True,
            True,
        ),
        {
            1: (zeros(3, 8), zeros(4, 7)),
            2: WRONG_KEPT,
            3: (zeros(3, 7, dtype=DOUBLE), zeros(4, 7), spread(4, 7)),
            4: (zeros(4, 2, dtype=DOUBLE), zeros(4, 3), spread(4, 3)),
        },
    ),
    "top_k_kl_forward": (
        (*HEAD, *SAMPLES, *WORDS),
        {
            1: (zeros(3, 2, dtype=LONG), zeros(dtype=LONG), spread(4, 2, dtype=LONG)),
            2: (zeros(4, 1, dtype=DOUBLE), zeros(4, 2), spread(4, 2)),
            3: WRONG_IDS,
            4: WRONG_DOUBLES,
        },
    ),
    "top_k_kl_backward": (
        (*HEAD, *SAMPLES, STATISTICS + 1, zeros(4, dtype=DOUBLE), *WORDS),
        {
            1: (zeros(3, 2, dtype=LONG), zeros(dtype=LONG), spread(4, 2, dtype=LONG)),
            2: (zeros(4, 1, dtype=DOUBLE), zeros(4, 2), spread(4, 2)),
            3: WRONG_IDS,
            4: WRONG_DOUBLES,
            5: WRONG_STATISTICS,
            6: WRONG_DOUBLES,
        },
    ),
    "head_logps": (
        (LOGITS, HEAD[1], *WORDS),
        {1: (zeros(3, 2, dtype=LONG), zeros(4, 2, dtype=torch.int32), zeros(dtype=LONG))},
    ),
}


@pytest.mark.parametrize("operator", CALLS)
def test_right_arguments_are_taken(operator):
    getattr(OPS, operator)(*CALLS[operator][0])


@pytest.mark.parametrize(
    "operator, place, wrong",
    [
        (operator, place, wrong)
        for operator, (_, wrongs) in CALLS.items()
        for place, several in wrongs.items()
        for wrong in several
    ],
)
def test_wrong_arguments_are_refused(operator, place, wrong):
    arguments = list(CALLS[operator][0])
    arguments[place] = wrong
    with pytest.raises(ValueError, match=r"^\w+: .* must "):
        getattr(OPS, operator)(*arguments)


def test_every_operator_with_tensors_is_here():
    names = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith("tether::")]
    schemas = {name.split("::")[1]: torch._C._get_schema(name, "") for name in names}
    with_tensors = {
        name
        for name, schema in schemas.items()
        if any("Tensor" in str(each.type) for each in schema.arguments)
    }
    in_python = {"linear_gradient", "linear_policy_loss", "linear_token_logps"}
    # With their library: test_cuda.py.
    on_cuda = {"policy_gradient_of_logits", *(operator for operator, _ in ON_DEVICE.values())}
    assert with_tensors - on_cuda == set(CALLS) | in_python


# ---- offsets -------------------------------------------------------------------------------------

WRONG_OFFSETS = {
    (2, 5, 6): "must run from 0 to 6, the size of {}, got 2 to 6",
    (0, 5, 8): "must run from 0 to 6, the size of {}, got 0 to 8",
    (0, 9, 6): "must not decrease, got 6 after 9 at [2]",
    (0, 4, 2, 6): "must not decrease, got 2 after 4 at [2]",
}
# Differences of these wrap around: to the eye of int64 none is negative.
WRAPPING = {(0, 2**63 - 1, -5, 6): "must not decrease, got -5 after 9223372036854775807 at [2]"}
PACKED = -torch.arange(1.0, 7.0)


def packed_calls(module, offsets, advantages):
    """name of what is packed -> the call, in public functions and in the reference alike."""
    full, on = torch.ones(6), {"offsets": offsets}
    policy = (PACKED, advantages, full)
    of_module = {
        "policy_loss": ("logps", lambda: module.policy_loss(*policy, objective="ppo", **on).loss),
        "value_loss": ("values", lambda: module.value_loss(PACKED, PACKED, full, **on).loss),
    }
    if module is tether:
        return of_module | {
            "policy_token_losses": (
                "logps",
                lambda: tether.policy_token_losses(*policy, objective="ppo", **on),
            ),
            "local_counts": ("logps", lambda: tether.local_counts(*policy, objective="ppo", **on)),
            "preference_loss": (
                "logps",
                lambda: tether.preference_loss(PACKED, PACKED, full, **on).loss,
            ),
            "discounted_returns": (
                "rewards",
                lambda: tether.discounted_returns(PACKED, full, **on),
            ),
            "generalized_advantage_estimation": (
                "rewards",
                lambda: tether.generalized_advantage_estimation(PACKED, PACKED, full, **on),
            ),
            "kl_report": ("log_ratios", lambda: tether.kl_report(PACKED, full, **on)),
        }
    return of_module | {
        "preference_loss": (
            "logps",
            lambda: module.preference_loss(PACKED, full, PACKED, **on).loss,
        ),
        "local_counts": ("logps", lambda: module.local_counts(*policy, **on)),
    }


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("module", [tether, tether.reference])
@pytest.mark.parametrize("numbers, rule", WRONG_OFFSETS.items())
def test_offsets_are_refused(module, numbers, rule, dtype):
    offsets = torch.tensor(numbers, dtype=dtype)
    advantages = torch.ones(len(numbers) - 1)
    for function, (name, call) in packed_calls(module, offsets, advantages).items():
        with pytest.raises(ValueError) as caught:
            call()
        assert str(caught.value) == f"{function}: offsets {rule.format(name)}"


@pytest.mark.parametrize("numbers, rule", WRAPPING.items())
def test_offsets_that_wrap_are_refused(numbers, rule):
    offsets = torch.tensor(numbers)
    calls = packed_calls(tether.reference, offsets, torch.ones(3))
    calls["policy_token_losses"] = packed_calls(tether, offsets, torch.ones(3))[
        "policy_token_losses"
    ]
    for function, (_, call) in calls.items():
        with pytest.raises(ValueError) as caught:
            call()
        assert str(caught.value) == f"{function}: offsets {rule}"


@pytest.mark.parametrize("numbers", [*WRONG_OFFSETS, *WRAPPING])
def test_offsets_that_nothing_waits_for_make_results_nan(numbers, monkeypatch):
    monkeypatch.setattr(tether.reference.rows, "check_offset_values", lambda *_: None)
    calls = packed_calls(tether.reference, torch.tensor(numbers), torch.ones(len(numbers) - 1))
    for name, (_, call) in calls.items():
        assert call().isnan().all(), name
    logps = PACKED.clone().requires_grad_()
    each = tether.reference.policy_token_losses(
        logps, torch.ones(len(numbers) - 1), torch.ones(6), offsets=torch.tensor(numbers)
    )
    assert each.isnan().all()


def test_one_offset_holds_no_tokens():
    meta = {"device": "meta"}
    with pytest.raises(ValueError) as caught:
        tether.policy_loss(
            torch.zeros(6, **meta),
            torch.zeros(0, **meta),
            torch.ones(6, **meta),
            offsets=torch.zeros(1, dtype=LONG, **meta),
        )
    assert str(caught.value) == (
        "policy_loss: offsets must run from 0 to 6, the size of logps, got one number"
    )
