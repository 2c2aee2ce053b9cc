"""Losses, reports and weights on a device where waiting is an error; run by test_waiting.py."""

import elsewhere
import pytest
import tether
import torch
from batches import LENGTHS, packed, padded_batch
from test_batch_weights import RULES, batch_of_rule
from test_devices import CALLS, CONSTANT, LEAVES, numbers

# Look at what they are given.
WAIT = {
    "response_targets",
    "support",
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


@pytest.mark.parametrize("form", ["padded", "weights", "equal", "one", "none"])
@pytest.mark.parametrize("shift_mean", [True, False])
def test_whitening_is_that_of_the_cpu(form, shift_mean):
    batch = padded_batch(3, lengths={"one": (1, 0), "none": (0, 0)}.get(form, LENGTHS))
    mask = batch["response_mask"]
    values = torch.where(mask, 3 + batch["logps"], torch.nan)
    if form == "weights":
        mask = mask * torch.rand(mask.shape, dtype=torch.float64).clamp_min(0.1)
    elif form == "equal":
        values = torch.where(mask, 0.1, torch.nan)
    arguments = {"values": values, "response_mask": mask, "shift_mean": shift_mean}
    (actual,) = evaluated("whiten", arguments)
    torch.testing.assert_close(actual, tether.whiten(**arguments), rtol=1e-12, atol=1e-14)
    assert form != "equal" or not shift_mean or (actual == 0).all()


def trajectories(seed, lengths, layout):
    """Rows with holes, ends of every kind and numbers of each token."""
    batch = padded_batch(seed, lengths=lengths)
    generator = torch.Generator().manual_seed(seed)
    shape = batch["logps"].shape
    ends = torch.rand(shape, generator=generator)
    tokens = {
        name: torch.randn(shape, generator=generator, dtype=torch.float64)
        for name in ("rewards", "values", "truncation_values", "log_ratios")
    }
    tokens |= {"done": ends < 0.1, "truncated": (ends > 0.05) & (ends < 0.2)}
    tokens["lambdas"] = torch.rand(shape, generator=generator, dtype=torch.float64)
    tokens["response_mask"] = batch["response_mask"] & (ends < 0.8)
    if layout == "packed":
        inside = batch["response_mask"]
        tokens = {name: each[inside] for name, each in tokens.items()}
        tokens["offsets"] = packed(batch)["offsets"]
    elif layout == "rows":
        tokens["lambdas"] = tokens["lambdas"][:, 0].contiguous()
    bootstrap = torch.randn(shape[0], generator=generator, dtype=torch.float64)
    return {**tokens, "bootstrap": bootstrap}


@pytest.mark.parametrize("layout", ["padded", "packed", "rows"])
@pytest.mark.parametrize("gap", ["carry", "decay"])
@pytest.mark.parametrize(
    "estimator", [name for name, row in tether.advantages().items() if not row.of_groups]
)
def test_recursions_are_those_of_the_cpu(estimator, gap, layout):
    optional = ("bootstrap", "done", "truncated", "lambdas")
    for seed, lengths in enumerate((LENGTHS, (9, 9, 4, 0, 0, 7), (2,), (0, 0), (70, 64, 3))):
        arguments = trajectories(seed, lengths, layout)
        arguments |= {"estimator": estimator, "gamma": 0.97, "gap": gap}
        without = {k: x for k, x in arguments.items() if k not in optional}
        without.pop("truncation_values")
        spoiled = arguments | {"rewards": arguments["rewards"].clone()}
        spoiled["rewards"].view(-1)[3:4] = torch.inf
        for given in (arguments, without, spoiled):
            for a, b in zip(evaluated("advantage", given), tether.advantage(**given), strict=True):
                torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13, equal_nan=True)


def test_no_tokens_and_no_rewards():
    nothing = torch.zeros(2, 0)
    arguments = {"rewards": nothing, "values": nothing, "response_mask": nothing}
    for each in evaluated("generalized_advantage_estimation", arguments):
        assert each.shape == (2, 0)
    assert evaluated("group_advantage", {"rewards": torch.zeros(0), "groups": 2})[0].shape == (0,)
    assert evaluated("whiten", {"values": nothing, "response_mask": nothing})[0].shape == (2, 0)


@pytest.mark.parametrize("groups", ["ids", "size"])
@pytest.mark.parametrize(
    "rule", [name for name, row in tether.advantages().items() if row.of_groups]
)
def test_groups_are_those_of_the_cpu(rule, groups):
    generator = torch.Generator().manual_seed(2)
    rewards = torch.randn(24, generator=generator, dtype=torch.float64)
    rewards[8:16] = 0.1
    order = torch.arange(24) if groups == "size" else torch.randperm(24, generator=generator)
    ids = (torch.arange(24) // 8 - 5)[order]
    ids[1] = 90 if groups == "ids" else ids[1]
    lengths = torch.randint(0, 9, (24,), generator=generator)
    lengths[ids == ids[0]] = 0
    row = tether.advantages()[rule]
    plans = [{name: value} for name, choice in row.choices.items() for value in choice.legal]
    plans += [{"epsilon": 0.0, "nan_reward": "missing"}] if "epsilon" in row.options else []
    for options in [{}, *plans]:
        missing = options.get("nan_reward") == "missing"
        given = rewards.clone()[order]
        if missing:
            given[::7] = torch.nan
        arguments = {"estimator": rule, "rewards": given, "lengths": lengths, **options}
        arguments["groups"] = 8 if groups == "size" else ids
        expected = tether.advantage(**arguments).advantages
        actual = evaluated("advantage", arguments)[0]
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-14)
        same = (given == 0.1) & (ids != 90)
        assert (actual[same] == 0).all() or options.get("baseline") == "none"


def test_a_reward_that_is_none_spoils_its_group_on_a_device():
    rewards = torch.tensor([1.0, torch.nan, 3.0, 5.0])
    (out,) = evaluated("group_advantage", {"rewards": rewards, "groups": 2, "scale": "none"})
    assert out[:2].isnan().all() and out[2:].tolist() == [-1, 1]


def test_moments_merge_on_a_device():
    batch = padded_batch(4)
    values, mask = batch["logps"], batch["response_mask"]
    expected = tether.moments(values, mask)
    there = elsewhere.moved({"values": values, "mask": mask})
    with elsewhere.no_waiting():
        parts = [
            tether.moments(there["values"][rows], there["mask"][rows])
            for rows in (slice(0, 2), slice(2, None), slice(0, 0))
        ]
        step = parts[2].merge(parts[0]).merge(parts[2]).merge(parts[1])
        white = tether.whiten(there["values"], there["mask"], step=step)
    for a, b in zip(step, expected, strict=True):
        assert a.cpu().item() == pytest.approx(b, rel=1e-12)
    torch.testing.assert_close(white.cpu(), tether.whiten(values, mask), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("form", ["padded", "packed"])
@pytest.mark.parametrize(
    "settings",
    [*({"estimator": each} for each in ("k1", "k2", "k3", "k_lambda")),
     {"estimator": "k_lambda", "lambda_": 0.3}],
)  # fmt: skip
def test_a_report_of_kl_is_that_of_the_cpu(form, settings):
    for seed, lengths in enumerate((LENGTHS, (9, 9, 4, 0, 0, 7), (1,), (0, 0))):
        batch = padded_batch(seed, lengths=lengths)
        batch = packed(batch) if form == "packed" else batch
        d = batch["old_logps"] - batch["logps"]
        others = {"response_mask": batch["response_mask"], "offsets": batch.get("offsets")}
        for scale in (1, 1e3, 1e200, torch.nan):
            arguments = {"log_ratios": d * scale, **others, **settings}
            expected = torch.tensor(tether.kl_report(**arguments), dtype=torch.float64)
            actual = torch.stack(evaluated("kl_report", arguments))
            noise = 1e-15 + 1e-13 * abs(expected[0].nan_to_num().item())  # of an error of 0
            torch.testing.assert_close(actual, expected, rtol=1e-11, atol=noise, equal_nan=True)


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
    for call in (
        lambda x: tether.group_advantage(x[0], 2),
        lambda x: tether.advantage("opo", x[0], groups=3),
        lambda x: tether.whiten(x, x, step=tether.Moments(-1, 0, 0)),
    ):
        messages = []
        for given in (x, x.to(elsewhere.NAME)):
            with pytest.raises(ValueError) as caught:
                call(given)
            messages.append(str(caught.value))
        assert messages[0] == messages[1]
