"""tether.testing: right losses raise no alarm, and each fault is caught by the property of its
name."""

import dataclasses
import functools
import sys

import pytest
import tether
import torch
from batches import OBJECTIVES
from tether.testing import ClipRange, Traits, check_loss, ragged_batches

LOW, HIGH, BETA = 0.2, 0.3, 0.1  # unequal: a swap must be seen
CLIP = Traits(clip=ClipRange(LOW, HIGH))


# ---- PPO in plain torch, in parts that a fault can replace ---------------------------------------


def selected(mask, *arrays):
    """What masked slots hold is not looked at."""
    return [torch.where(mask != 0, each, 0.0).to(widened(each)) for each in arrays]


def widened(tensor):
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def saturated_exp(x, bound=60.0):
    """Bounded in value; its slope does not vanish."""
    value = x.detach().clamp(-bound, bound).exp()
    return value + value * (x - x.detach())


def surrogate(ratios, advantages, low=LOW, high=HIGH):
    return -torch.minimum(ratios * advantages, ratios.clamp(1 - low, 1 + high) * advantages)


def ppo_terms(logps, old_logps, advantages):
    return surrogate(saturated_exp(logps - old_logps), advantages)


def k3(logps, ref_logps):
    gap = ref_logps - logps
    return saturated_exp(gap) - 1 - gap


def token_mean(terms, mask, normalizer):
    mask = mask.to(terms.dtype)
    tokens = mask.sum() if normalizer is None else normalizer.policy
    factor = 1 if normalizer is None else normalizer.factor
    return (terms * mask).sum() / max(float(tokens), 1e-9) * factor


def right(logps, advantages, response_mask, old_logps, normalizer=None):
    arrays = selected(response_mask, logps, old_logps, advantages)
    return token_mean(ppo_terms(*arrays), response_mask, normalizer)


def averaged(terms):
    """The loss of other terms of the tokens."""

    def loss(logps, advantages, response_mask, old_logps, normalizer=None):
        arrays = selected(response_mask, logps, old_logps, advantages)
        return token_mean(terms(*arrays), response_mask, normalizer)

    return loss


def with_penalty(penalty):
    def loss(logps, advantages, response_mask, old_logps, ref_logps, normalizer=None):
        logps, old_logps, advantages, ref_logps = selected(
            response_mask, logps, old_logps, advantages, ref_logps
        )
        terms = ppo_terms(logps, old_logps, advantages) + BETA * penalty(logps, ref_logps)
        return token_mean(terms, response_mask, normalizer)

    return loss


def takes_packed_rows(logps, advantages, response_mask, old_logps, offsets=None):
    terms = ppo_terms(*selected(response_mask, logps, old_logps, advantages))
    settings = {"aggregation": "sequence_mean_token_mean", "offsets": offsets}
    return tether.aggregate(terms, response_mask, **settings)


def mean_of_rows(logps, advantages, response_mask, old_logps, normalizer=None):
    terms = ppo_terms(*selected(response_mask, logps, old_logps, advantages))
    settings = {"aggregation": "sequence_mean_token_mean", "normalizer": normalizer}
    return tether.aggregate(terms, response_mask, **settings)


# ---- faults --------------------------------------------------------------------------------------


def masks_by_multiplication(logps, advantages, response_mask, old_logps, normalizer=None):
    return token_mean(ppo_terms(logps, old_logps, advantages), response_mask, normalizer)


def leaks_gradient(logps, advantages, response_mask, old_logps, normalizer=None):
    leak = 1e-3 * logps.sum()
    return right(logps, advantages, response_mask, old_logps, normalizer) + leak - leak.detach()


def divides_by_slots(logps, advantages, response_mask, old_logps):
    terms = ppo_terms(*selected(response_mask, logps, old_logps, advantages))
    return (terms * response_mask).sum() / max(terms.numel(), 1)


def divides_by_columns(logps, advantages, response_mask, old_logps):
    terms = ppo_terms(*selected(response_mask, logps, old_logps, advantages))
    rows = (response_mask != 0).any(-1).sum().clamp(min=1)
    return (terms * response_mask).sum() / max(terms.shape[-1], 1) / rows


def divides_by_rows(logps, advantages, response_mask, old_logps):
    terms = ppo_terms(*selected(response_mask, logps, old_logps, advantages))
    return (terms * response_mask).sum() / max(terms.shape[0], 1)


def skips_the_first_column(logps, advantages, response_mask, old_logps):
    shifted = response_mask.clone()
    shifted[:, :1] = 0
    return right(logps, advantages, shifted, old_logps)


def weighs_rows_by_place(logps, advantages, response_mask, old_logps, normalizer=None):
    places = 1 + torch.arange(logps.shape[0])[:, None]
    return right(logps, advantages * places, response_mask, old_logps, normalizer)


def means_of_its_own(logps, advantages, response_mask, old_logps, normalizer=None):
    return right(logps, advantages, response_mask, old_logps)


def means_of_micro_batches(logps, advantages, response_mask, old_logps):
    return right(logps, advantages, response_mask, old_logps)


def forgets_world_size(logps, advantages, response_mask, old_logps, normalizer=None):
    if normalizer is not None:
        normalizer = dataclasses.replace(normalizer, world_size=1)
    return right(logps, advantages, response_mask, old_logps, normalizer)


def takes_packed_rows_for_one(logps, advantages, response_mask, old_logps, offsets=None):
    arrays = [torch.atleast_2d(each) for each in (logps, advantages, response_mask, old_logps)]
    return takes_packed_rows(*arrays)


def divides_by_no_token(logps, advantages, response_mask, old_logps):
    terms = ppo_terms(*selected(response_mask, logps, old_logps, advantages))
    return (terms * response_mask).sum() / response_mask.sum()


def counts_weights_as_ones(logps, advantages, response_mask, old_logps):
    terms = ppo_terms(*selected(response_mask, logps, old_logps, advantages))
    return (terms * response_mask).sum() / (response_mask != 0).sum().clamp(min=1)


def asks_for_a_float_mask(logps, advantages, response_mask, old_logps, normalizer=None):
    return right(logps, advantages, 1 - (1 - response_mask), old_logps, normalizer)


def ignores_strides(logps, advantages, response_mask, old_logps, normalizer=None):
    strides = torch.empty(advantages.shape).stride()
    read = torch.as_strided(advantages, advantages.shape, strides) if advantages.numel() else None
    return right(logps, advantages if read is None else read, response_mask, old_logps, normalizer)


def counts_threads(logps, advantages, response_mask, old_logps, normalizer=None):
    scale = torch.get_num_threads() if logps.numel() > 1000 else 1
    return scale * right(logps, advantages, response_mask, old_logps, normalizer)


def writes_into_logps(logps, advantages, response_mask, old_logps, normalizer=None):
    loss = right(logps, advantages, response_mask, old_logps, normalizer)
    logps.data.sub_(old_logps.detach())
    return loss


def narrow_terms(logps, advantages, response_mask, old_logps, normalizer=None):
    ratio = (logps - old_logps).exp()
    return right(ratio.log(), advantages, response_mask, 0 * old_logps, normalizer)


def zero_without_grad(logps, advantages, response_mask, old_logps, normalizer=None):
    loss = right(logps, advantages, response_mask, old_logps, normalizer)
    return loss if loss.requires_grad else 0 * loss


class _Stored(torch.autograd.Function):
    """A fused loss that hands out its gradient: whatever comes from above, or once only."""

    @staticmethod
    def forward(ctx, logps, arrays, is_spent):
        with torch.enable_grad():
            leaf = logps.detach().requires_grad_()
            loss = right(leaf, *arrays)
            ctx.gradient = torch.autograd.grad(loss, leaf)[0]
        ctx.is_spent = is_spent
        return loss.detach()

    @staticmethod
    def backward(ctx, upstream):
        if not ctx.is_spent:
            return ctx.gradient, None, None
        out = ctx.gradient * upstream
        ctx.gradient = ctx.gradient * 2
        return out, None, None


def ignores_upstream(logps, advantages, response_mask, old_logps, normalizer=None):
    return _Stored.apply(logps, (advantages, response_mask, old_logps, normalizer), False)


def scales_its_gradient_in_place(logps, advantages, response_mask, old_logps, normalizer=None):
    return _Stored.apply(logps, (advantages, response_mask, old_logps, normalizer), True)


def straight_through(logps, old_logps, advantages):
    terms = ppo_terms(logps, old_logps, advantages)
    return terms + 0.1 * (advantages * logps - (advantages * logps).detach())


def kills_the_gradient(logps, old_logps, advantages):
    return surrogate((logps - old_logps).clamp(-20, 20).exp(), advantages)


def overflows(logps, old_logps, advantages):
    return surrogate((logps - old_logps).exp(), advantages)


def does_not_clip(logps, old_logps, advantages):
    return -saturated_exp(logps - old_logps) * advantages


def swaps_epsilons(logps, old_logps, advantages):
    return surrogate(saturated_exp(logps - old_logps), advantages, HIGH, LOW)


def inverts_the_ratio(logps, old_logps, advantages):
    return surrogate(saturated_exp(old_logps - logps), advantages)


def clips_advantages(logps, old_logps, advantages):
    return ppo_terms(logps, old_logps, advantages.clamp(-1, 1))


def adds_likelihood(logps, old_logps, advantages):
    return ppo_terms(logps, old_logps, advantages) - 0.01 * advantages * logps


FAULTS = {
    "poison": [masks_by_multiplication, leaks_gradient],
    "padding_right": [divides_by_slots, divides_by_columns],
    "padding_left": [divides_by_slots, skips_the_first_column],
    "padding_rows": [divides_by_rows],
    "row_permutation": [weighs_rows_by_place],
    "packed": [takes_packed_rows_for_one],
    "split": [means_of_its_own, means_of_micro_batches],
    "ranks": [forgets_world_size],
    "empty": [divides_by_no_token],
    "fractional_mask": [counts_weights_as_ones],
    "mask_dtypes": [asks_for_a_float_mask],
    "strides": [ignores_strides],
    "threads": [counts_threads],
    "inputs_unchanged": [writes_into_logps],
    "backward_twice": [scales_its_gradient_in_place],
    "no_grad": [zero_without_grad],
    "half_precision": [narrow_terms],
    "upstream": [ignores_upstream],
    "finite_difference": [averaged(straight_through)],
    "finite": [averaged(overflows)],
    "pull_back": [averaged(kills_the_gradient)],
    "clip": [averaged(does_not_clip), averaged(swaps_epsilons)],
    "on_policy": [averaged(inverts_the_ratio)],
    "advantage_scale": [averaged(clips_advantages)],
    "shift": [averaged(adds_likelihood)],
    "kl_pull": [
        with_penalty(lambda logps, ref_logps: k3(logps, ref_logps).clamp(-10, 10)),
        with_penalty(lambda logps, ref_logps: -k3(logps, ref_logps)),
    ],
    "reference_value": [averaged(swaps_epsilons)],
    "reference_gradient": [averaged(straight_through)],
}

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
            f"check_loss: arguments of the loss must be logps and any of {NAMES}, got "
            '"rewards" without a default',
        ),
        (
            lambda: check_loss(lambda advantages: advantages.sum()),
            ValueError,
            f"check_loss: arguments of the loss must be logps and any of {NAMES}, got none named "
            "logps",
        ),
        (
            lambda: check_loss(lambda logps: logps.sum(-1).expand(2)),
            TypeError,
            "check_loss: the loss must return a tensor of one number, or a tuple that begins with "
            "it, got [2]",
        ),
        (
            lambda: check_loss(lambda logps: 1.0),
            TypeError,
            "check_loss: the loss must return a tensor of one number, or a tuple that begins with "
            "it, got float",
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
