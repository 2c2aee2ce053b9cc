"""tether.testing: right losses raise no alarm, and each fault is caught by the property of its
name."""

import dataclasses
import functools
import sys

import pytest
import tether
import torch
from batches import OBJECTIVES
from faulty_losses import (
    CLIP,
    FAULTS,
    HIGH,
    LOW,
    divides_by_no_token,
    k3,
    masks_by_multiplication,
    mean_of_rows,
    narrow_terms,
    right,
    selected,
    takes_packed_rows,
    token_mean,
    with_penalty,
    writes_into_logps,
)
from tether.testing import ClipRange, Traits, check_loss, ragged_batches

_CASES = [(id, fault) for id, faults in FAULTS.items() for fault in faults]


@pytest.mark.parametrize(("id", "fault"), _CASES, ids=[each for each, _ in _CASES])
def test_each_fault_is_caught_by_its_property(id, fault):
    settings = {"traits": CLIP}
    if id.startswith("reference"):
        settings = {"objective": "ppo", "epsilon_low": LOW, "epsilon_high": HIGH}
    found = check_loss(fault, **settings, batches=6, skip=FAULTS.keys() - {id})[id]
    assert found.outcome == "fails", found
    assert found.meaning
    assert id == "threads" or (found.batch and found.rows * found.columns <= 4), found


def test_every_property_has_a_fault():
    assert {each.id for each in check_loss(right, skip=FAULTS).properties} == FAULTS.keys()


def test_inputs_of_float64_are_copies_too():
    traits = Traits(dtypes=(torch.float64,))
    skip = FAULTS.keys() - {"inputs_unchanged"}
    report = check_loss(writes_into_logps, traits=traits, batches=0, skip=skip)
    assert report["inputs_unchanged"].detail.endswith("logps was written to")


def test_one_fault_is_not_said_of_every_property():
    def never_a_number(logps, response_mask):
        return logps.where(response_mask != 0, 0).float().sum() * float("nan")

    assert check_loss(never_a_number, batches=1).failed == ("finite_difference", "finite", "empty")
    found = check_loss(divides_by_no_token, batches=4, traits=CLIP, skip=["finite"]).failed
    assert found == ("split", "empty")


# ---- right losses --------------------------------------------------------------------------------


RIGHT = [(right, 1), (takes_packed_rows, 2), (mean_of_rows, 3), (with_penalty(k3), 4)]


@pytest.mark.parametrize(("loss", "seed"), RIGHT)
def test_right_losses_raise_no_alarm(loss, seed):
    is_of_whole_batch = loss is takes_packed_rows
    traits = dataclasses.replace(CLIP, is_of_whole_batch=is_of_whole_batch)
    check_loss(loss, traits=traits, seed=seed, batches=3).assert_ok()


def test_ppo_agrees_with_the_catalogue():
    report = check_loss(right, "ppo", epsilon_low=LOW, epsilon_high=HIGH, batches=4)
    report.assert_ok()
    asked = {each.id for each in report.properties if each.outcome == "holds"}
    assert FAULTS.keys() - asked == {"kl_pull", "packed"}


def referenced(objective):
    def loss(
        logps,
        advantages,
        response_mask,
        old_logps,
        ref_logps,
        rollout_logps,
        turn_ids,
        offsets=None,
        normalizer=None,
    ):
        return tether.reference.policy_loss(
            logps,
            advantages,
            response_mask,
            old_logps=old_logps,
            ref_logps=ref_logps,
            rollout_logps=rollout_logps,
            turn_ids=turn_ids,
            offsets=offsets,
            normalizer=normalizer,
            objective=objective,
        )

    return loss


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_objective_keeps_its_promises(objective):
    row_advantages = OBJECTIVES.index(objective) % 2 == 1
    traits = Traits(row_advantages=row_advantages, dtypes=(torch.float64,))
    loss = referenced(objective)
    check_loss(loss, objective, traits=traits, batches=0, skip=["threads"]).assert_ok()


def test_the_operator_keeps_the_promise_of_bits():
    check_loss(
        functools.partial(tether.policy_loss, objective="ppo"),
        "ppo",
        traits=Traits(bitwise=True),
        batches=4,
    ).assert_ok()


# ---- the report ----------------------------------------------------------------------------------

FOUND = """\
FAILS poison: What masked slots hold changes no bit of loss and gradient; their gradient is 0.
        float32, [B, T] = [1, 2], masked slots of logps hold nan: loss nan, not -1
        Then: a NaN or a huge number in padding, as a masked softmax leaves it, reaches the weights.
        logps = torch.tensor([[-1.0, -1.0]], dtype=torch.float32)
        old_logps = torch.tensor([[-1.0, -1.0]], dtype=torch.float32)
        advantages = torch.tensor([[1.0, 1.0]], dtype=torch.float32)
        response_mask = torch.tensor([[0.0, 1.0]], dtype=torch.float32)"""


def test_the_report_shows_the_smallest_batch_and_the_numbers():
    report = check_loss(masks_by_multiplication, skip=FAULTS.keys() - {"poison", "upstream"})
    head = "1 properties hold, 1 fail, 26 do not apply (seed 1, 12 random batches)"
    lines = str(report).splitlines()
    assert lines[0] == head
    assert "ok    upstream: The gradient is linear in the upstream gradient." in lines
    assert FOUND in str(report)
    assert not report.ok and report.failed == ("poison",)
    with pytest.raises(AssertionError) as error:
        report.assert_ok()
    assert str(error.value) == f"{head}\n{FOUND}"


def test_the_same_seed_gives_the_same_report():
    skip = FAULTS.keys() - {"half_precision"}
    first, again = (check_loss(narrow_terms, seed=3, batches=4, skip=skip) for _ in range(2))
    assert first == again
    assert first != check_loss(narrow_terms, seed=4, batches=4, skip=skip)


def test_only_what_the_signature_names_is_given():
    seen = set()

    def loss(logps, response_mask, beta=0.5, **others):
        seen.update(others)
        return token_mean(-selected(response_mask, logps)[0], response_mask, None)

    report = check_loss(loss, traits=Traits(is_of_whole_batch=True), batches=2)
    report.assert_ok()
    assert not seen
    assert report["on_policy"].detail == "the loss takes no advantages"


def test_what_a_loss_raises_is_in_the_report():
    def loss(logps, advantages, response_mask, old_logps):
        if logps.shape[0] > 1:
            raise RuntimeError("one row\nonly")
        return right(logps, advantages, response_mask, old_logps)

    found = check_loss(loss, batches=2, skip=FAULTS.keys() - {"upstream"})["upstream"]
    assert found.detail == "float32, [B, T] = [2, 1], it raised RuntimeError: one row"


def test_threads_are_restored():
    before = torch.get_num_threads()
    check_loss(right, batches=0, skip=FAULTS.keys() - {"threads"})
    assert torch.get_num_threads() == before


# ---- bad input -----------------------------------------------------------------------------------

NAMES = (
    "old_logps, ref_logps, rollout_logps, entropies, turn_ids, advantages, response_mask, "
    "normalizer, offsets"
)


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (
            lambda: check_loss(lambda logps, rewards: logps.sum()),
            ValueError,
            f"check_loss: arguments of a policy loss must be logps and any of {NAMES}, got "
            '"rewards" without a default',
        ),
        (
            lambda: check_loss(lambda advantages: advantages.sum()),
            ValueError,
            f"check_loss: arguments of a policy loss must be logps and any of {NAMES}, got none "
            "named logps",
        ),
        (
            lambda: check_loss(lambda logps: logps.sum(-1).expand(2)),
            TypeError,
            "check_loss: the loss must return a tensor without dimensions, or a tuple that begins "
            "with it, got [2]",
        ),
        (
            lambda: check_loss(lambda logps, advantages: -logps * advantages),
            TypeError,
            "check_loss: the loss must return a tensor without dimensions, or a tuple that begins "
            "with it, got [1, 1]",
        ),
        (
            lambda: check_loss(lambda logps, advantages: (-logps * advantages).sum(1)),
            TypeError,
            "check_loss: the loss must return a tensor without dimensions, or a tuple that begins "
            "with it, got [1]",
        ),
        (
            lambda: check_loss(lambda logps: 1.0),
            TypeError,
            "check_loss: the loss must return a tensor without dimensions, or a tuple that begins "
            "with it, got float",
        ),
        (
            lambda: check_loss(right, epsilon_low=0.1),
            ValueError,
            'check_loss: objective must be given with options, got "epsilon_low" alone',
        ),
        (
            lambda: check_loss(right, "ppo", epsilon_low=2.0),
            ValueError,
            "check_loss: epsilon_low must be in [0, 1], got 2",
        ),
        (
            lambda: check_loss(right, seed=1.5),
            TypeError,
            "check_loss: seed must be an int, got float",
        ),
        (
            lambda: ragged_batches(("returns",)),
            ValueError,
            "ragged_batches: arrays must be of old_logps, ref_logps, rollout_logps, entropies, "
            'turn_ids, got "returns"',
        ),
        (
            lambda: ragged_batches(max_rows=0),
            ValueError,
            "ragged_batches: max_rows and max_columns must be at least 1, got 0 and 6",
        ),
        (
            lambda: ragged_batches(dtype=torch.int64),
            TypeError,
            "ragged_batches: dtype must be float32, float64, bfloat16 or float16, got int64",
        ),
        (
            lambda: ragged_batches(dtype="float32"),
            TypeError,
            "ragged_batches: dtype must be a torch.dtype, got str",
        ),
        (
            lambda: ragged_batches("ref_logps"),
            TypeError,
            "ragged_batches: arrays must be a list of strings, got str",
        ),
        (
            lambda: check_loss(right, skip="poison"),
            TypeError,
            "check_loss: skip must be a list of strings, got str",
        ),
        (
            lambda: check_loss(right, skip=[3]),
            TypeError,
            "check_loss: skip must be a list of strings, got int in it",
        ),
        (
            lambda: check_loss(right, batches=-1),
            ValueError,
            "check_loss: batches must be at least 0, got -1",
        ),
        (
            lambda: check_loss(right, traits=Traits),
            TypeError,
            "check_loss: traits must be tether.testing.Traits, got the class Traits",
        ),
        (
            lambda: check_loss(torch.exp),
            ValueError,
            "check_loss: user_loss must say what it takes, got exp without a signature. Wrap it in "
            "a function",
        ),
        (
            lambda: Traits(dtypes=()),
            TypeError,
            "Traits: dtypes must be a tuple of floating dtypes, got none",
        ),
        (
            lambda: Traits(dtypes=("float32",)),
            TypeError,
            "Traits: dtypes must be a torch.dtype, got str",
        ),
        (lambda: Traits(bitwise=1), TypeError, "Traits: bitwise must be a bool, got int"),
        (
            lambda: Traits(clip=0.2),
            TypeError,
            "Traits: clip must be a ClipRange or None, got float",
        ),
        (lambda: ClipRange(-1), ValueError, "ClipRange: low must be at least 0, got -1"),
    ],
)
def test_bad_input_gets_one_sentence(call, error, text):
    with pytest.raises(error) as caught:
        call()
    assert str(caught.value) == text


def test_unknown_properties_are_named():
    with pytest.raises(
        ValueError, match=r'^check_loss: skip must be of reference_value, .*, got "poisons"$'
    ):
        check_loss(right, skip=["poisons"])
    with pytest.raises(
        KeyError, match=r'Report: property must be one of reference_value, .*, got "x"'
    ):
        check_loss(right, skip=FAULTS)["x"]


# ---- hypothesis ----------------------------------------------------------------------------------


def test_ragged_batches_find_a_fault_and_make_it_small():
    hypothesis = pytest.importorskip("hypothesis")
    quiet = hypothesis.settings(database=None, deadline=None, max_examples=60)

    def finite(loss):
        return lambda batch: bool(loss(**batch).isfinite())

    strategy = ragged_batches(("old_logps",), max_rows=3, max_columns=4)
    smallest = hypothesis.find(
        strategy, lambda batch: not finite(masks_by_multiplication)(batch), settings=quiet
    )
    assert smallest["response_mask"].tolist() == [[0.0]]
    with pytest.raises(hypothesis.errors.NoSuchExample):
        hypothesis.find(strategy, lambda batch: not finite(right)(batch), settings=quiet)


def test_ragged_batches_are_what_was_asked_for():
    hypothesis = pytest.importorskip("hypothesis")
    arrays = ("old_logps", "ref_logps", "rollout_logps", "entropies", "turn_ids")
    settings = {"row_advantages": True, "fractional_mask": True, "dtype": torch.float32}
    seen = []

    @hypothesis.settings(database=None, deadline=None, max_examples=40)
    @hypothesis.given(ragged_batches(arrays, masked=7.0, **settings))
    def draw(batch):
        mask, shape = batch["response_mask"], batch["logps"].shape
        assert set(batch) == {"logps", "advantages", "response_mask", *arrays}
        assert batch["advantages"].shape == shape[:1]
        assert (batch["logps"][mask == 0] == 7).all() and (batch["logps"][mask != 0] < 0).all()
        assert batch["turn_ids"].dtype == torch.int64
        assert (batch["turn_ids"].diff(dim=1) >= 0).all()
        tether.policy_loss(**{k: v for k, v in batch.items() if k != "entropies"})
        seen.append((mask == 0.25).any().item())

    draw()
    assert any(seen)


def test_without_hypothesis_there_is_a_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "hypothesis", None)
    with pytest.raises(ImportError) as error:
        ragged_batches()
    assert str(error.value) == (
        "ragged_batches: hypothesis must be installed, got none. pip install tether[testing]"
    )


def test_gradients_are_looked_at_where_the_caller_takes_none():
    def wrong(logps, advantages, response_mask, old_logps=None, normalizer=None):
        batch = (logps, advantages, response_mask)
        settings = {"objective": "ppo", "old_logps": old_logps, "normalizer": normalizer}
        loss = tether.policy_loss(*batch, **settings).loss
        return loss.detach() + 5 * (loss - loss.detach())

    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert not check_loss(wrong, objective="ppo", batches=1).ok
