"""Weights of tokens that need the whole batch, and those that a batch gives with each term."""

import json
import math
import pathlib

import pytest
import tether
import torch
from batches import evaluated, packed, padded_batch, referenced

PEERS = pathlib.Path(__file__).resolve().parent.parent / "golden" / "peers"
COVARIANCE = json.loads((PEERS / "verl_covariance.json").read_text())["cases"]
ENTROPY = json.loads((PEERS / "trl_entropy.json").read_text())["cases"]
RULES = list(tether.batch_weight_rules())


def tensor(rows):
    return torch.tensor(rows, dtype=torch.float64)


def batch_of_rule(**changes):
    """What any rule needs."""
    batch = padded_batch() | changes
    names = ("logps", "old_logps", "rollout_logps", "advantages", "response_mask")
    mask = batch["response_mask"]
    entropies = torch.where(mask, batch["logps"].abs(), math.nan)
    return {name: batch[name] for name in (*names, "turn_ids")} | {"entropies": entropies}


# ---- the peers' own functions -------------------------------------------------------------------


def covariance_terms(case):
    """The tensors of a recording and what stands for verl's loss."""
    of_loss, clips = case["settings"]["of_loss"], case["settings"]["clips"]
    batch = {
        "logps": tensor(case["log_prob"]),
        "old_logps": tensor(case["old_log_prob"]),
        "advantages": tensor(case["advantages"]),
        "response_mask": torch.tensor(case["response_mask"]),
    }
    if case["settings"]["loss"] == "kl_cov":
        picks = tether.batch_weights("kl_cov", **batch, share=of_loss["kl_cov_ratio"])
        settings = {"objective": "kl_cov", "beta": of_loss["ppo_kl_coef"], "kl_weights": picks}
        return batch, settings, picks
    epsilons = {
        "epsilon_low": clips["clip_ratio_low"],
        "epsilon_high": clips["clip_ratio_high"],
    }
    picks = tether.batch_weights(
        "clip_cov",
        **batch,
        share=of_loss["clip_cov_ratio"],
        low=of_loss["clip_cov_lb"],
        high=of_loss["clip_cov_ub"],
        **epsilons,
    )
    return batch, {"objective": "ppo", "token_weights": picks, **epsilons}, picks


@pytest.mark.parametrize("case", COVARIANCE, ids=lambda case: case["name"])
def test_clip_cov_and_kl_cov_equal_verl(case):
    batch, settings, _ = covariance_terms(case)
    log_prob = batch["logps"].requires_grad_()
    loss, _ = tether.policy_loss(**batch, **settings)
    loss.backward()
    assert loss.item() == pytest.approx(case["loss"], rel=1e-12)
    expected = tensor(case["dlog_prob"])
    torch.testing.assert_close(log_prob.grad, expected, rtol=1e-12, atol=1e-15)


def test_some_tokens_are_picked_and_some_are_not():
    for loss, value in (("clip_cov", 0), ("kl_cov", 1)):
        cases = [case for case in COVARIANCE if case["settings"]["loss"] == loss]
        picks = [(covariance_terms(case)[2] == value).double().mean() for case in cases]
        assert sum(0 < share < 1 for share in picks) >= 3


@pytest.mark.parametrize("case", ENTROPY, ids=lambda case: case["name"])
def test_top_entropy_equals_trl(case):
    mask, entropies = torch.tensor(case["response_mask"]), tensor(case["entropies"])
    share = case["share"]
    picked = tether.batch_weights("top_entropy", entropies, mask, entropies=entropies, share=share)
    assert torch.equal(picked[mask != 0], tensor(case["picked"])[mask != 0])


# ---- every rule ---------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES)
def test_masked_slots_and_packing_change_nothing(rule):
    batch = batch_of_rule()
    mask = batch["response_mask"]
    weights = tether.batch_weights(rule, **batch)
    assert weights.dtype == torch.float64 and weights.isfinite().all()
    assert (weights[~mask] == 1).all()
    assert weights[mask].unique().numel() > 1 or rule == "clip_cov"
    rows = packed(batch)
    rows["advantages"] = rows["advantages"][:, None]
    assert torch.equal(tether.batch_weights(rule, **rows), weights[mask])
    by_token = batch | {"advantages": batch["advantages"][:, None].expand(mask.shape).contiguous()}
    assert torch.equal(tether.batch_weights(rule, **by_token), weights)
    poisoned = batch_of_rule(**padded_batch(poison=-math.inf))
    assert torch.equal(tether.batch_weights(rule, **poisoned), weights)


@pytest.mark.parametrize("rule", RULES)
def test_what_is_live_in_a_step_is_taken_as_it_is(rule):
    batch = batch_of_rule()
    live = {name: batch[name].clone().requires_grad_() for name in ("logps", "entropies")}
    weights = tether.batch_weights(rule, **batch | live)
    assert not weights.requires_grad
    assert torch.equal(weights, tether.batch_weights(rule, **batch))


@pytest.mark.parametrize("rule", RULES)
def test_a_number_that_is_not_finite_makes_every_weight_nan(rule):
    batch = batch_of_rule()
    mask = batch["response_mask"]
    read = {"m2po": "rollout_logps", "normalized_importance": "old_logps"}
    read |= {"top_entropy": "entropies", "turn_mean": None}
    for name in ("logps", "old_logps", "rollout_logps", "entropies"):
        broken = batch | {name: batch[name].clone()}
        broken[name][0, 0] = math.inf
        weights = tether.batch_weights(rule, **broken)[mask]
        if name == read.get(rule, "logps"):
            assert weights.isnan().all()
        elif name == "entropies" or rule in ("top_entropy", "turn_mean"):
            assert weights.isfinite().all()


@pytest.mark.parametrize("rule", RULES)
def test_huge_numbers_and_no_tokens_are_no_crash(rule):
    batch = batch_of_rule()
    none = batch | {"response_mask": torch.zeros_like(batch["response_mask"])}
    assert (tether.batch_weights(rule, **none) == 1).all()
    batch["logps"][0, 0], batch["old_logps"][0, 1] = -1e308, 1e308
    batch["advantages"][0] = -1e300
    assert tether.batch_weights(rule, **batch).isfinite().all()
    if "high" in tether.batch_weight_rules()[rule].options:
        assert tether.batch_weights(rule, **batch, high=math.inf).isfinite().all()


def test_the_picks_of_a_seed_are_its_own():
    generator = torch.Generator().manual_seed(0)
    logps = -torch.rand(8, 64, generator=generator, dtype=torch.float64)
    advantages = torch.randn(8, 64, generator=generator, dtype=torch.float64)
    ones = torch.ones_like(logps)

    def picks(seed):
        return tether.batch_weights(
            "clip_cov", logps, ones, old_logps=logps, advantages=advantages, low=0, share=0.02,
            seed=seed,
        )  # fmt: skip

    assert (picks(1) == 0).sum() == 10  # floor(0.02 * 512)
    assert torch.equal(picks(1), picks(1)) and not torch.equal(picks(1), picks(2))


LEVELS = tether.batch_weight_rules()["normalized_importance"].choices["level"].legal
PATHS = (tether._ops.KERNELS, frozenset())


@pytest.mark.parametrize("beyond", ["truncated", "masked"])
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("kernels", PATHS, ids=["kernel", "torch"])
def test_normalized_importance_is_its_definition(level, beyond, kernels, monkeypatch):
    monkeypatch.setattr(tether._ops, "KERNELS", kernels)
    batch = padded_batch(spread=0.5 if level.endswith("mean") else 0.15)
    mask, ids = batch["response_mask"], batch["turn_ids"]
    settings = {"low": 0.75, "high": 1.3125, "level": level, "beyond": beyond}
    names = ("logps", "response_mask", "old_logps", "rollout_logps", "turn_ids")
    arrays = {name: batch[name] for name in names}
    ours = tether.batch_weights("normalized_importance", **arrays, **settings)
    segments = {}  # the log-ratios of each
    for i, t in mask.nonzero().tolist():
        turn = int(ids[i, t])
        key = {"token": (i, t), "sequence": i, "turn": (i, turn)}[level.split("_")[0]]
        x = (batch["old_logps"] - batch["rollout_logps"])[i, t]
        segments.setdefault(key, []).append(((i, t), x))
    ratios = {}
    for key, each in segments.items():
        xs = torch.stack([x for _, x in each])
        ratio = (xs.mean() if level.endswith("mean") else xs.sum()).exp()
        inside = ratio.clamp(0.75, 1.3125)
        ratios[key] = inside if beyond == "truncated" or inside == ratio else 0 * ratio
    assert any(0.75 < r < 1.3125 for r in ratios.values())
    assert any(r in (0, 0.75, 1.3125) for r in ratios.values())
    mean = torch.stack(list(ratios.values())).mean()
    for key, each in segments.items():
        for place, _ in each:
            assert ours[place].item() == pytest.approx((ratios[key] / mean).item(), rel=1e-12)
    if level.startswith("turn"):  # runs of the mask
        del arrays["turn_ids"]
        runs = tether.batch_weights("normalized_importance", **arrays, **settings)
        own = (mask.long() == 0).cumsum(1)
        given = tether.batch_weights("normalized_importance", **arrays, turn_ids=own, **settings)
        assert torch.equal(runs, given) and not torch.equal(runs, ours)


def test_normalized_importance_looks_at_turns_where_its_level_does():
    batch = batch_of_rule()
    batch["turn_ids"] = batch["turn_ids"].flip(1)
    weights = tether.batch_weights("normalized_importance", **batch)
    assert weights.isfinite().all()
    with pytest.raises(ValueError, match="turn_ids must not decrease"):
        tether.batch_weights("normalized_importance", **batch, level="turn_mean")


@pytest.mark.parametrize("kernels", PATHS, ids=["kernel", "torch"])
def test_where_all_ratios_are_masked_nothing_weighs(kernels, monkeypatch):
    monkeypatch.setattr(tether._ops, "KERNELS", kernels)
    batch = batch_of_rule()
    settings = {"low": 1e3, "high": 2e3, "beyond": "masked"}
    for level in LEVELS:
        weights = tether.batch_weights("normalized_importance", **batch, level=level, **settings)
        assert (weights[batch["response_mask"]] == 0).all()


def test_wrong_calls_get_one_clear_message():
    batch = batch_of_rule()
    calls = {
        "batch_weights: rule must be one of clip_cov, kl_cov, top_entropy, m2po, fipo, "
        'normalized_importance, turn_mean, got "cov"': ("cov", {}),
        "batch_weights: entropies must be given for top_entropy, got none": (
            "top_entropy",
            {"entropies": None},
        ),
        "batch_weights: share must be in [0, 1], got 2": ("kl_cov", {"share": 2}),
        'batch_weights: option must be one of share, got "high"': ("kl_cov", {"high": 2}),
        "batch_weights: low must be at most high 1, got 5": ("fipo", {"low": 5, "high": 1}),
        "batch_weights: level must be one of token, sequence_mean, sequence_sum, turn_mean, "
        'turn_sum, got "turn"': ("normalized_importance", {"level": "turn"}),
        'batch_weights: beyond must be one of truncated, masked, got "clip"': (
            "normalized_importance",
            {"beyond": "clip"},
        ),
        "batch_weights: seed must be a whole number, got 0.5": ("clip_cov", {"seed": 0.5}),
    }
    for message, (rule, changes) in calls.items():
        with pytest.raises(ValueError) as caught:
            tether.batch_weights(rule, **batch | changes)
        assert str(caught.value) == message


@pytest.mark.parametrize(
    "over, aggregation", [("row", "sequence_mean_token_mean"), ("batch", "token_mean")]
)
def test_turns_that_count_alike(over, aggregation):
    batch = padded_batch()
    mask, ids = batch["response_mask"], batch["turn_ids"]
    w = tether.batch_weights("turn_mean", batch["logps"], mask, turn_ids=ids, over=over)
    settings = {"objective": "ppo", "beta": 0.5, "level": "turn_mean"}
    given = {"token_weights": w, "kl_weights": w}
    ours = evaluated(batch | given, aggregation=aggregation, **settings)
    logps = batch["logps"].detach().requires_grad_()
    each = tether.policy_token_losses(**batch | {"logps": logps}, **settings)
    rows = [
        torch.stack([each[i][mask[i] & (ids[i] == k)].mean() for k in ids[i][mask[i]].unique()])
        for i in range(len(mask))
        if mask[i].any()
    ]
    by_row = torch.stack([row.mean() for row in rows]).mean()
    loss = by_row if over == "row" else torch.cat(rows).mean()
    loss.backward()
    assert ours.loss.item() == pytest.approx(loss.item(), rel=1e-12)
    torch.testing.assert_close(ours.dlogps, logps.grad, rtol=1e-12, atol=1e-15)


# ---- the weights of a batch ---------------------------------------------------------------------


def weighted_batch():
    batch = padded_batch()
    generator = torch.Generator().manual_seed(5)
    mask = batch["response_mask"]

    def drawn():
        values = torch.randn(mask.shape, generator=generator, dtype=torch.float64)
        return torch.where(mask, values, math.nan)

    entropies = torch.where(mask, drawn().abs(), math.nan)
    weights = {f"{term}_weights": drawn() for term in ("token", "kl", "entropy")}
    return batch | {"entropies": entropies} | weights


SETTINGS = [
    {"beta": 0.5, "entropy_coef": 0.25},
    {"beta": 0.5, "entropy_coef": 0.25, "kl_reference": "old", "kl_correction": "ratio"},
    {"beta": 0.5, "kl_reference": "rollout", "kl_estimator": "k1", "kl_gradient": "k2"},
    {"beta": 0.5, "kl_correction": "level_ratio", "level": "sequence_mean"},
    {"beta": 0.5, "kl_correction": "level_ratio", "level": "turn_sum"},
    {"beta": 0.5, "kl_correction": "rollout_ratio", "kl_reference": "old"},
    {"beta": 0.5, "kl_correction": "rollout_ratio", "level": "sequence_mean"},
    {"beta": 0.5, "kl_correction": "detached_rollout_ratio", "level": "turn_sum"},
    {"level": "sequence_token", "aggregation": "token_mean"},
    {"objective": "kl_cov", "beta": 0.25},
    {"objective": "dppo_tv", "beta": 0.25, "entropy_coef": 0.5},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_kernel_equals_reference_and_packed(settings):
    batch = weighted_batch()
    ours, plain = evaluated(batch, 1.5, **settings), referenced(batch, 1.5, **settings)
    for a, b in zip(ours, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)
    rows = packed(batch) | {"advantages": batch["advantages"][:, None]}
    again = evaluated(rows, 1.5, **settings)
    torch.testing.assert_close(again.loss, ours.loss, rtol=1e-14, atol=0)
    torch.testing.assert_close(again.dlogps, ours.dlogps[batch["response_mask"]])


def test_each_term_has_its_own():
    """By the terms of the tokens: W S + v beta K - e c H."""
    batch, mask = weighted_batch(), padded_batch()["response_mask"]
    given = {f"{term}_weights": batch.pop(f"{term}_weights") for term in ("token", "kl", "entropy")}
    entropies = batch.pop("entropies")
    settings = {"objective": "linear", "beta": 0.5}
    with_penalty = tether.policy_token_losses(**batch, **settings)
    surrogate = tether.policy_token_losses(**batch, objective="linear")
    penalty = with_penalty - surrogate
    terms = (
        given["token_weights"] * surrogate
        + given["kl_weights"] * penalty
        - given["entropy_weights"] * 0.25 * entropies
    )
    out = tether.policy_loss(**batch, **given, entropies=entropies, **settings, entropy_coef=0.25)
    assert out.loss.item() == pytest.approx(terms[mask].mean().item(), rel=1e-12)
    each = tether.policy_token_losses(
        **batch, **given, entropies=entropies, **settings, entropy_coef=0.25
    )
    torch.testing.assert_close(each[mask], terms[mask], rtol=1e-12, atol=1e-14)
    metrics = out.metrics.to_dict()
    W = given["token_weights"][mask]
    assert metrics["weight_mean"] == pytest.approx(W.mean().item(), rel=1e-12)
    assert metrics["kl"] == pytest.approx((given["kl_weights"] * penalty)[mask].mean().item() / 0.5)


def test_a_gradient_of_entropies_has_their_weights():
    batch = weighted_batch()
    mask = batch["response_mask"]
    entropies = batch["entropies"].requires_grad_()
    tether.policy_loss(**batch, objective="ppo", entropy_coef=0.5).loss.backward()
    expected = torch.where(mask, -0.5 * batch["entropy_weights"] / mask.sum(), 0.0)
    torch.testing.assert_close(entropies.grad, expected, rtol=1e-14, atol=0)


@pytest.mark.parametrize("level", ["token", "sequence_mean"])
@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["token_weights", "kl_weights", "entropy_weights", "entropies"])
def test_what_is_not_finite_is_seen(name, broken, level):
    for correction in ("none", "level_ratio"):
        batch = weighted_batch()
        batch[name][0, 1] = broken
        settings = {"beta": 0.5, "entropy_coef": 0.5, "kl_correction": correction, "level": level}
        for evaluate in (evaluated, referenced):
            out = evaluate(batch, **settings)
            assert out.loss.isnan()
            assert out.sums[10, 0] == 1  # nonfinite


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["token_weights", "kl_weights"])
def test_huge_weights_count_as_a_bound_on_every_path(name, dtype):
    batch = weighted_batch()
    batch = {k: v.to(dtype) if v.is_floating_point() else v for k, v in batch.items()}
    batch[name][0, 1] = 3e38 if dtype == torch.float32 else 1e300
    ours, plain = evaluated(batch, beta=0.5), referenced(batch, beta=0.5)
    assert ours.loss.isfinite() and ours.dlogps.isfinite().all()
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    torch.testing.assert_close(ours.loss, plain.loss, rtol=tolerance, atol=0)
    torch.testing.assert_close(ours.dlogps, plain.dlogps, rtol=tolerance, atol=1e-5)


def test_bool_and_integer_weights_are_numbers():
    batch = weighted_batch()
    picks = batch["token_weights"] > 0
    as_numbers = evaluated(batch | {"token_weights": picks.double()})
    for picked in (picks, picks.to(torch.int64), picks.float()):
        assert torch.equal(evaluated(batch | {"token_weights": picked}).dlogps, as_numbers.dlogps)


def test_gates_do_not_take_a_weight_of_0_out():
    batch = padded_batch()
    mask = batch["response_mask"]
    half = torch.where(mask & (torch.arange(mask.shape[1]) % 2 == 0), 0.0, 1.0).double()
    gates = {"ratio_gate": {"low": 0.7, "high": 1.4}}
    settings = {"objective": "linear", "weights": gates}
    for evaluate in (tether.local_counts, tether.reference.local_counts):
        options = settings if evaluate is tether.local_counts else {
            "ratio_gate": "token", "ratio_gate.low": 0.7, "ratio_gate.high": 1.4}  # fmt: skip
        plain = evaluate(**batch, **options)
        given = evaluate(**batch, **options, token_weights=half)
        a, b = (x if isinstance(x, torch.Tensor) else x.policy for x in (plain, given))
        assert torch.equal(a, b)


def test_linear_policy_loss_takes_them():
    generator = torch.Generator().manual_seed(2)
    batch = weighted_batch()
    mask = batch["response_mask"]
    hidden = torch.randn(*mask.shape, 6, generator=generator, dtype=torch.float64)
    weight = torch.randn(11, 6, generator=generator, dtype=torch.float64)
    targets = torch.randint(0, 11, mask.shape, generator=generator)
    made = tether.linear_token_logps(hidden, weight, targets, entropies=True)
    names = ("advantages", "response_mask", "ref_logps", "rollout_logps")
    arrays = {name: batch[name] for name in names}
    arrays |= {f"{term}_weights": batch[f"{term}_weights"] for term in ("token", "kl", "entropy")}
    arrays["old_logps"] = torch.where(mask, made.logps - 0.25, math.nan)
    settings = {"beta": 0.5, "entropy_coef": 0.25}
    for level in ("token", "sequence_mean"):
        plain = tether.policy_loss(
            made.logps, entropies=made.entropies, **arrays, **settings, level=level
        )
        ours = tether.linear_policy_loss(hidden, weight, targets, **arrays, **settings, level=level)
        torch.testing.assert_close(ours.loss, plain.loss, rtol=1e-12, atol=0)


def test_the_penalty_asks_for_its_own_reference_alone():
    batch = padded_batch() | {"ref_logps": None}
    old = evaluated(batch, beta=0.5, kl_reference="old")
    as_reference = evaluated(batch | {"ref_logps": batch["old_logps"]}, beta=0.5)
    assert torch.equal(old.dlogps, as_reference.dlogps)
    with pytest.raises(ValueError) as caught:
        evaluated(batch | {"rollout_logps": None}, beta=0.5, kl_reference="rollout")
    assert str(caught.value) == (
        "policy_loss: rollout_logps must be given when beta is greater than 0 and kl_reference is "
        "rollout or kl_correction a rollout_ratio, got none"
    )


@pytest.mark.parametrize("advantage", [0.1, 0.3, 1 / 3])
def test_of_equal_covariances_the_first_is_picked(advantage):
    logps = -torch.arange(1, 31, dtype=torch.float64)[None] / 30
    advantages = torch.full((1,), advantage, dtype=torch.float64)
    picks = tether.batch_weights("kl_cov", logps, torch.ones(1, 30), advantages=advantages)
    assert picks.nonzero().tolist() == [[0, 0]]
