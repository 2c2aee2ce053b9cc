"""Losses, reports and weights on a device where waiting is an error; run by test_waiting.py."""

import elsewhere
import pytest
import tether
import torch
from batches import LENGTHS, packed, padded_batch
from test_batch_weights import RULES, batch_of_rule
from test_devices import CALLS, CONSTANT, LEAVES, numbers

# Come to the CPU, as documented, or look at what they are given.
WAIT = {
    "advantage",
    "discounted_returns",
    "generalized_advantage_estimation",
    "group_advantage",
    "kl_report",
    "moments",
    "response_targets",
    "support",
    "whiten",
}


@pytest.fixture(autouse=True)
def device():
    elsewhere.install()


def evaluated(function, arguments):
    """Results and gradients, without waiting."""
    there = elsewhere.moved(arguments)
    leaves = [] if function in CONSTANT else [there[x] for x in LEAVES if x in there]
    leaves = [each.requires_grad_() for each in leaves if isinstance(each, torch.Tensor)]
    with elsewhere.no_waiting():
        out = numbers(getattr(tether, function)(**there))
        roots = [each for each in out if isinstance(each, torch.Tensor) and each.requires_grad]
        if roots:
            sum(each.sum().double() for each in roots).backward()
    out += [each.grad for each in leaves]
    return [each.cpu() for each in out if isinstance(each, torch.Tensor)]


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x.sum().item(),
        lambda x: bool(x.any()),
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        lambda x: x.cpu(),
        lambda x: torch.ones(2).to(x.device),
        lambda x: x.copy_(torch.ones(2)),
        lambda x: torch.ones(2).copy_(x),
        lambda x: torch.equal(x, x),
    ],
)
def test_what_waits_is_seen(wait):
    x = torch.ones(2).to(elsewhere.NAME)
    wait(x)
    with elsewhere.no_waiting(), pytest.raises((AssertionError, RuntimeError)):
        wait(x)


@pytest.mark.parametrize("function", [name for name in CALLS if name not in WAIT])
def test_no_function_waits(function):
    arguments = {k: x for k, x in CALLS[function].items() if k != "gradient_buffer"}
    assert evaluated(function, arguments)


@pytest.mark.parametrize("family", ["policy", "preference", "value"])
def test_no_objective_waits(family):
    function = f"{family}_loss"
    for name, row in tether.objectives(family).items():
        arguments = CALLS[function] | {"objective": name}
        if family == "policy":
            arguments["rollout_logps"] = arguments["logps"] - 0.1
        elif family == "preference" and name != "kto":
            pairs = {"labels": None, "offsets": torch.tensor([0, 3, 6])}
            arguments |= {key: each for key, each in pairs.items() if key in arguments}
        if "label_smoothing" in row.options:  # 0 is not legal for each
            arguments["label_smoothing"] = 0.1
        assert evaluated(function, arguments), name


def test_no_choice_of_a_policy_loss_waits():
    batch = CALLS["policy_loss"] | {"rollout_logps": CALLS["policy_loss"]["logps"] - 0.1}
    row = tether.objectives()["grpo"]
    for choice in ("level", "aggregation", "kl_estimator", "kl_correction", "kl_reference"):
        for value in row.choices[choice].legal:
            settings = {choice: value, "allow_biased_gradient": True, "kl_ratio_high": 10}
            assert evaluated("policy_loss", batch | settings), value
    for name in tether.weights():
        assert evaluated("policy_loss", batch | {"weights": {name: {}}}), name
    for level in tether.weights()["ratio_gate"].levels:
        assert evaluated("policy_loss", batch | {"weights": {"ratio_gate": {"level": level}}}), (
            level
        )


@pytest.mark.parametrize("function", ["policy_loss", "policy_token_losses", "local_counts"])
def test_no_array_of_a_policy_loss_waits(function):
    batch = CALLS["policy_loss"]
    of_tokens = {f"{of}_weights": torch.rand(6) for of in ("token", "kl", "entropy")}
    of_tokens |= {
        "rollout_logps": batch["logps"] - 0.1,
        "turn_ids": torch.tensor([0, 0, 1, 0, 1, 1]),
    }
    settings = {"level": "turn_mean", "weights": {"ratio_gate": {"level": "turn_max"}}}
    assert evaluated(function, {**batch, **of_tokens, "row_tokens": torch.ones(2), **settings})


def test_counts_and_formulas_of_ones_own_do_not_wait():
    @tether.Surrogate
    def squared(token, strength=0.1):
        return strength * token.log_ratio.square() - token.advantage * token.logp

    batch = elsewhere.moved(CALLS["policy_loss"] | {"objective": squared})
    batch["logps"].requires_grad_()
    with elsewhere.no_waiting():
        step = tether.local_counts(**batch) + tether.local_counts(**batch)
        loss, metrics = tether.policy_loss(**batch, normalizer=step)
        (metrics + metrics, loss.backward())
    assert (2 * loss).isfinite() and batch["logps"].grad.cpu().isfinite().all()


def test_no_link_of_a_preference_loss_waits():
    pairs = {"labels": None, "offsets": torch.tensor([0, 3, 6]), "objective": "dpo"}
    arguments = {k: x for k, x in (CALLS["preference_loss"] | pairs).items() if x is not None}
    for link in tether.objectives("preference")["dpo"].choices["link"].legal:
        settings = {"link": link, "reference": link != "log_odds"}
        assert evaluated("preference_loss", arguments | settings), link


# ---- the same numbers ----------------------------------------------------------------------------


def settings_of(rule):
    """With which some are picked."""
    if rule == "clip_cov":
        wide = {"low": -10, "high": 10, "epsilon_low": 1, "epsilon_high": 50}
        return {"share": 0.3, "seed": 5, **wide}
    return {"share": 0.2} if rule == "kl_cov" else {}


@pytest.mark.parametrize("form", ["padded", "packed", "weights"])
@pytest.mark.parametrize("rule", RULES)
def test_batch_weights_are_those_of_the_cpu(rule, form):
    for seed, lengths in enumerate((LENGTHS, (9, 9, 4, 0, 0, 7), (1,), (0, 0))):
        batch = batch_of_rule(**padded_batch(seed, lengths=lengths))
        if form == "packed":
            batch = packed(batch)
            batch["advantages"] = batch["advantages"][:, None]
        elif form == "weights":
            weights = torch.rand(len(lengths), 9, dtype=torch.float64) + 0.01
            batch["response_mask"] = torch.where(batch["response_mask"], weights.clamp_max(1), 0.0)
        expected = tether.batch_weights(rule, **batch, **settings_of(rule))
        (actual,) = evaluated("batch_weights", {"rule": rule, **batch, **settings_of(rule)})
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=0)
        assert form != "padded" or seed > 1 or expected.unique().numel() > 1


def test_turns_of_the_batch_and_of_runs():
    batch = batch_of_rule()
    for changes in ({"over": "batch"}, {"turn_ids": None}, {"over": "batch", "turn_ids": None}):
        arguments = {"rule": "turn_mean", **batch, **changes}
        (actual,) = evaluated("batch_weights", arguments)
        torch.testing.assert_close(actual, tether.batch_weights(**arguments), rtol=1e-12, atol=0)


@pytest.mark.parametrize("rule", RULES)
def test_what_is_not_finite_makes_every_weight_nan(rule):
    batch = batch_of_rule()
    for name in ("logps", "old_logps", "rollout_logps", "entropies"):
        broken = batch | {name: batch[name].clone()}
        broken[name][0, 0] = -torch.inf
        (actual,) = evaluated("batch_weights", {"rule": rule, **broken})
        expected = tether.batch_weights(rule, **broken)
        assert torch.equal(actual.isnan(), expected.isnan())


@pytest.mark.parametrize("rule", RULES)
def test_ties_extremes_and_options_in_tensors(rule):
    batch = batch_of_rule()
    alike = {k: torch.ones_like(x) for k, x in batch.items() if x.is_floating_point()}
    alike["old_logps"] = 0 * alike["logps"]
    batch["logps"][0, 0], batch["old_logps"][0, 1] = -1e308, 1e308
    row = tether.batch_weight_rules()[rule].options
    options = {k: torch.tensor(x.default, dtype=torch.float64) for k, x in row.items()}
    for given in (batch, batch | alike):
        arguments = {"rule": rule, **given, **options}
        (actual,) = evaluated("batch_weights", {"rule": rule, **given})
        expected = tether.batch_weights(**arguments)
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=0)
        with_tensors = tether.batch_weights(**elsewhere.moved(given), rule=rule, **options)
        torch.testing.assert_close(with_tensors.cpu(), expected, rtol=1e-12, atol=0)


def of_report(arguments):
    out = tether.mismatch_report(**arguments)
    numbers = [*out[:8], *(each for level in out[8:] for each in level)]
    return [torch.tensor(each, dtype=torch.float64) for each in numbers]


@pytest.mark.parametrize("form", ["padded", "packed"])
def test_a_report_of_mismatch_is_that_of_the_cpu(form):
    names = ("old_logps", "rollout_logps", "response_mask")
    for seed, lengths in enumerate((LENGTHS, (9, 9, 4, 0, 0, 7), (1,), (0, 0))):
        batch = padded_batch(seed, lengths=lengths)
        batch = packed(batch) if form == "packed" else batch
        arguments = {name: batch[name] for name in names if name in batch}
        arguments["offsets"] = batch.get("offsets")
        expected = of_report(arguments)
        actual = evaluated("mismatch_report", arguments)
        assert len(actual) == len(expected) == 23
        for a, b in zip(actual, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-15)
        for broken in (torch.nan, torch.inf, 1e300):
            if lengths[0]:
                arguments["old_logps"] = batch["old_logps"].clone()
                arguments["old_logps"].view(-1)[0] = broken
                expected = of_report(arguments)
                for a, b in zip(evaluated("mismatch_report", arguments), expected, strict=True):
                    torch.testing.assert_close(a, b, rtol=1e-12, atol=0, equal_nan=True)


def test_wrong_calls_get_the_same_message():
    batch = batch_of_rule()
    for rule, changes in (
        ("cov", {}),
        ("top_entropy", {"entropies": None}),
        ("kl_cov", {"share": 2}),
        ("fipo", {"low": 5, "high": 1}),
        ("clip_cov", {"seed": 0.5}),
    ):
        messages = []
        for given in (batch | changes, elsewhere.moved(batch | changes)):
            with pytest.raises(ValueError) as caught:
                tether.batch_weights(rule, **given)
            messages.append(str(caught.value))
        assert messages[0] == messages[1]
    x = torch.zeros(2, 3)
    with pytest.raises(ValueError) as caught:
        tether.mismatch_report(*(each.to(elsewhere.NAME) for each in (x, x[:1], x)))
    assert str(caught.value) == (
        "mismatch_report: rollout_logps must be [2, 3] like old_logps, got [1, 3]"
    )
