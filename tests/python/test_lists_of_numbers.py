"""Lists and arrays of numpy, where an argument has a number a row."""

import numpy
import pytest
import tether
import torch

ROWS, TOKENS = 3, 8
OFFSETS, ADVANTAGES = [0, 3, 3, 8], [1, -0.7, 0.3]


def made(dtype):
    generator = torch.Generator().manual_seed(1)
    logps, old_logps = (-torch.rand(TOKENS, generator=generator).to(dtype) for _ in range(2))
    mask = torch.tensor([1, 1, 0, 1, 1, 1, 0, 1])
    return logps, old_logps, mask


def pairs(logps, ref_logps, mask, **given):
    return tether.preference_loss(logps, ref_logps, mask, **given).loss


def policy(logps, old_logps, mask, advantages, **given):
    batch = {"old_logps": old_logps, "objective": "ppo", **given}
    return tether.policy_loss(logps, advantages, mask, **batch).loss


def counts(logps, old_logps, mask, **given):
    return tether.local_counts(logps, response_mask=mask, **given).policy


def token_losses(logps, old_logps, mask, advantages, **given):
    return tether.policy_token_losses(
        logps, advantages, mask, old_logps=old_logps, beta=0.0, **given
    )


def aggregated(logps, old_logps, mask, **given):
    return tether.aggregate(logps, mask, aggregation="sequence_mean_token_mean", **given)


def of_head(logps, old_logps, mask, advantages, **given):
    head = (torch.linspace(-1, 1, 4 * TOKENS).view(TOKENS, 4).to(logps.dtype), torch.eye(5, 4))
    ids = torch.arange(TOKENS) % 5
    batch = {"old_logps": old_logps, "objective": "gspo", **given}
    return tether.linear_policy_loss(*head, ids, advantages, mask, **batch).loss


def returns(logps, values, mask, **given):
    out = tether.advantage("gae", logps, mask, values=values, **given)
    return torch.stack(out)


POLICY = {"offsets": OFFSETS, "advantages": ADVANTAGES}
SUMS = {"offsets": OFFSETS, "row_tokens": [3, 1, 5.5]}
UNPAIRED = {
    "offsets": OFFSETS,
    "labels": [1, 0, 1],
    "objective": "kto",
    "baselines": [0.1, -0.2, 0],
}
CALLS = {
    "policy_loss": (policy, POLICY | {"row_tokens": [2, 1, 4]}),
    "a column": (policy, POLICY | {"advantages": [[1], [-0.7], [0.3]]}),
    "local_counts": (counts, POLICY),
    "policy_token_losses": (token_losses, POLICY),
    "linear_policy_loss": (of_head, POLICY),
    "aggregate": (aggregated, SUMS),
    "preference_loss": (pairs, UNPAIRED | {"answer_weights": [1, 2, 3]}),
    "advantage": (returns, {"offsets": OFFSETS, "bootstrap": [0, 1, 0.3], "lambdas": [1, 0, 0.9]}),
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("of", [list, tuple, numpy.array])
@pytest.mark.parametrize("path", ["kernels", "other"])
@pytest.mark.parametrize("name", CALLS)
def test_they_are_as_the_tensor(name, path, of, dtype, monkeypatch):
    if path == "other":
        monkeypatch.setattr(tether._ops, "KERNELS", frozenset())
    function, given = CALLS[name]
    words = {key: each for key, each in given.items() if isinstance(each, str)}
    numbers = {key: each for key, each in given.items() if key not in words}
    tensors = {
        key: torch.tensor(each, dtype=torch.int64 if key in ("offsets", "labels") else dtype)
        for key, each in numbers.items()
    }
    others = {key: of(each) for key, each in numbers.items()}
    want, got = (function(*made(dtype), **each, **words) for each in (tensors, others))
    assert got.dtype == want.dtype and torch.equal(got, want)


@pytest.mark.parametrize("of", [list, numpy.array])
def test_rewards_and_lengths_of_answers(of):
    rewards, lengths = [1.0, 0.0, 0.25, 0.5], [3, 2, 8, 1]
    tensors = torch.tensor(rewards, dtype=torch.float64), torch.tensor(lengths)
    want = tether.advantage("opo", tensors[0], groups=2, lengths=tensors[1])
    got = tether.advantage("opo", of(rewards), groups=2, lengths=of(lengths))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-6, atol=0)
    # Floats of numpy are float64, those of Python what torch makes of them; integers are numbers.
    assert got.advantages.dtype == (torch.float32 if of is list else torch.float64)
    whole = tether.group_advantage(of([1, 0, 0, 1]), 4)
    assert torch.equal(whole, tether.group_advantage(torch.tensor([1.0, 0, 0, 1]), 4))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"advantages": ["x"]}, "advantages must be a tensor, got list"),
        ({"advantages": [[1.0], [2.0, 3.0]]}, "advantages must be a tensor, got list"),
        ({"advantages": 3.0}, "advantages must be a tensor, got float"),
        ({"advantages": [1.0]}, "advantages must be [3] or [8], got [1]"),
        ({"offsets": [0, 3, 8.0]}, "offsets must be int32 or int64, got float32"),
        ({"offsets": [0, 3, 2, 8]}, "offsets must not decrease, got 2 after 3 at [2]"),
        ({"row_tokens": [3, 1]}, "row_tokens must be [3], got [2]"),
        ({"old_logps": [0.0] * TOKENS}, "old_logps must be a tensor, got list"),
    ],
)
def test_others_are_refused(change, sentence):
    logps, old_logps, mask = made(torch.float32)
    batch = {"old_logps": old_logps, "response_mask": mask, **POLICY, **change}
    with pytest.raises((TypeError, ValueError)) as error:
        tether.policy_loss(logps, **batch)
    assert str(error.value) == f"policy_loss: {sentence}"


def test_a_compiled_step_takes_them():
    batch = made(torch.float64)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(logps):
        return policy(logps, *batch[1:], **POLICY)

    torch.testing.assert_close(step(batch[0]), policy(*batch, **POLICY), rtol=1e-14, atol=0)


def test_a_list_of_what_requires_a_gradient_is_refused():
    """It would be lost."""
    logps, leaf = -torch.ones(2, 3), torch.tensor(1.0, requires_grad=True)
    with pytest.raises(ValueError) as caught:
        tether.policy_loss(logps, [leaf, 0.5], torch.ones(2, 3))
    assert str(caught.value) == (
        "policy_loss: advantages must not require grad, got a tensor that does. It is a constant "
        "of the loss: pass advantages.detach()"
    )


def test_numbers_of_python_are_not_rounded_to_half():
    """In bfloat16 1000 and 1001 are one number: both advantages were 0."""
    rewards = [1000.0, 1001.0]
    expected = tether.group_advantage(torch.tensor(rewards), 2)
    torch.set_default_dtype(torch.bfloat16)
    try:
        found = tether.group_advantage(rewards, 2)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(found, expected)
    assert (expected != 0).all()
